"""``Backward``: from the first gradient of the outermost backward until its end, when gradients are delivered."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import Replicate

from flex_model.core import fast
from flex_model.core.agreeing.status import told_to_all
from flex_model.core.agreeing.uneven import align
from flex_model.core.bound import Bound
from flex_model.core.call import ActiveCall, Staged, in_backward
from flex_model.core.editing import run_edit
from flex_model.core.gradients import meet_gradient, parameter_layout
from flex_model.core.hook_function import Call
from flex_model.core.inference import Form, Spot
from flex_model.core.ragged import merge
from flex_model.engines import GradientSite
from flex_model.errors import LayoutError
from flex_model.layout.claim import Claim
from flex_model.layout.layout import Layout
from flex_model.trees import tensors

if TYPE_CHECKING:
    from flex_model.core.runtime import Runtime

__all__ = ["Backward"]


class Backward:
    """The backward that runs, if one does: ``call`` is the forward it belongs to."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.call: ActiveCall | None = None
        self.edited = False
        self.staged: list[Staged] = []
        self.claims: dict[Form, Claim] = {}
        self._before: dict[int, Tensor | None] = {}
        self._task = -1

    def arm_outputs(self, call: ActiveCall, output: Any) -> None:
        interested = any(
            b.is_gradient or b.gradient_sink is not None or b.edit is not None for b in self.runtime.bounds if b.enabled
        )
        if not interested and not len(self.runtime.modules):
            return
        self.runtime.remembered[call.index] = call
        for tensor in tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(partial(self._on_output_gradient, call))

    def _on_output_gradient(self, call: ActiveCall, grad: Tensor) -> None:
        if self.call is not None and call.place is None and self._task != in_backward():  # of one that failed
            self.forget()
        self.arm(call)

    def forget(self) -> None:
        self.runtime.installed.show_again()
        self.call, self.edited = None, False
        self.staged, self.claims = [], {}
        self._before.clear()

    def arm(self, call: ActiveCall) -> None:
        """The backward of ``call`` has begun; be called when the outermost backward is done, after the engines are."""
        first = self.call is None
        self.call = call
        if call.snapshots and call.place is None:
            self.runtime.installed.show(call.bounds)
        if not first or call.place is not None:  # a pipeline's step has an end of its own
            return
        self._task = in_backward()
        self.begin()
        queue = torch.autograd.Variable._execution_engine.queue_callback
        queue(lambda: queue(self._end))

    def begin(self) -> None:
        """Note what was accumulated before, where gradients are met when the backward is done."""
        for bound in self._finished_parameters():
            owner, attribute = self.runtime.names.parameters[bound.name]
            engine, _ = self.runtime.engines.gradient_site(owner, attribute)
            assert engine is not None
            self._before[id(bound)] = engine.gradient_before(owner, attribute)

    def _finished_parameters(self) -> list[Bound]:
        out = []
        for bound in self.runtime.bounds:
            if bound.enabled and bound.hook_type == "tensor" and bound.module is not None:
                owner, attribute = self.runtime.names.parameters[bound.name]
                if self.runtime.engines.gradient_site(owner, attribute)[1].when == "finished":
                    out.append(bound)
        return out

    def on_parameter(self, bound: Bound, site: GradientSite, spec: Any, grad: Tensor) -> Tensor | None:
        if self.runtime.quiet:
            return None
        call = self.runtime.call_now()
        self.arm(call)
        bound.reached += 1
        if site.refusal:
            error = LayoutError(
                f"{bound.where}: the full gradient is unknown: {site.refusal}; "
                f"take the gradient of a module's value instead.",
                page="gradient-unknown",
            )
            self.runtime.outbox.refuse(bound, bound.key_of(0, False), error)
            return None
        layout = parameter_layout(self.runtime, grad, site.stated, spec)
        form = Form(Spot(bound.name, "param", 0), grad.dim(), True)
        return meet_gradient(self.runtime, [(bound, False)], 0, form, layout, call, grad)

    def _finish_parameter(self, bound: Bound, call: int) -> Staged | None:
        """Meet the whole gradient of a backward that is done; it is the same on all ranks of the mesh."""
        runtime = self.runtime
        owner, attribute = runtime.names.parameters[bound.name]
        engine, _ = runtime.engines.gradient_site(owner, attribute)
        assert engine is not None
        full = engine.full_gradient(owner, attribute, self._before.get(id(bound)))
        if full is None:
            return None
        bound.fired += 1
        bound.reached += 1
        whole = Layout(tuple(Replicate() for _ in runtime.mesh.axes), "the engine's own gathering", tuple(full.shape))
        chosen = full if bound.selection is None else bound.selection.take(full)
        selected = bound.selection is not None
        staged = Staged(bound, bound.key_of(0, False), chosen.clone(), layout=whole, selected=selected)
        if bound.edit is not None:
            self.edited = True
            out, _ = run_edit(bound, runtime.context, full, whole, 0, Call(call))
            if out is not None:
                engine.add_to_gradient(owner, attribute, out - full)
        return None if bound.sink is None else staged

    def finished_parameters(self, call: int) -> list[Staged]:
        """The gradients that are met when the backward is done; ``call`` is the index of its forward."""
        found = [self._finish_parameter(bound, call) for bound in self._finished_parameters()]
        self._before.clear()
        return [staged for staged in found if staged is not None]

    def end(self) -> list[Staged]:
        """A pipeline's step is over: the gradients met in it. What they claim is settled with the values' claims."""
        staged, self.staged = self.staged, []
        for form, claim in self.claims.items():
            self.runtime.outbox.claims.setdefault(form, claim)
        self.claims, self.edited = {}, False
        return staged

    def _end(self) -> None:
        self._finish()
        self.runtime.missed.after_backward()

    def _finish(self) -> None:
        """The outermost backward is over on every rank."""
        watch = self.runtime.watch
        with watch.telling(), watch.at("the end of the backward"), told_to_all():
            self._deliver()

    def _deliver(self) -> None:
        self.runtime.installed.show_again()
        call, self.call = self.call, None
        edited, self.edited = self.edited, False
        finished = self.finished_parameters(0 if call is None else call.index)
        if call is not None:
            call.snapshots.clear()
        staged, self.staged = [*finished, *self.staged], []
        if not self.runtime.mesh.axes:
            self.runtime.copies.wait()
            fast.put_all(staged)
            return
        outbox, uneven = self.runtime.outbox, self.runtime.installed.uneven
        claims, self.claims = self.claims, {}
        staged, rows = merge(staged, self.runtime.mesh), []
        if uneven:
            rows = outbox.status.exchange([(s.bound.where, s.key) for s in staged], len(claims))
        if claims or any(new for _, new, _ in rows):
            self.runtime.inference.settle(claims)
        if uneven:
            staged = staged if len({(count, mark) for count, _, mark in rows}) == 1 else align(self.runtime, staged, 1)
        refused, outbox.refused = outbox.refused, []
        items = []
        for one in staged:
            known = self.runtime.inference.known.get(one.form) if one.form is not None else None
            if isinstance(known, LayoutError):
                refused.append((one.bound, one.key, known))
            elif (item := outbox.item(one, refused)) is not None:
                items.append(item)
        if not uneven and (edited or any(i.layout.moving_axes and i.mode != "local" for i in items)):
            outbox.status.same_on_all(outbox.status.exchange([(i.where, "") for i in items]))
        outbox.deliver(items)
        self.runtime.modules.mean_gradients(self.runtime.mesh, uneven=uneven)
        outbox.raise_refused(refused)

    def stage(self, staged: Staged) -> None:
        self.staged.append(staged)
