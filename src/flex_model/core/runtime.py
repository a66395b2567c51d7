"""``Runtime``: the hooks of one model while they are on, the calls they belong to, and the points where values move.

A forward of the outermost module is a call. What it captures is staged and delivered at its end, or later where ranks
do not run in lockstep; gradients at the end of the outermost backward.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any
from weakref import WeakValueDictionary
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from flex_model.core import fast
from flex_model.core.bound import Bound, check_expected
from flex_model.core.call import ActiveCall, Staged, in_backward
from flex_model.core.editing import EditContext
from flex_model.core.firing import Point, meet_gradient, parameter_layout
from flex_model.core.groups import Groups
from flex_model.core.hook_function import Call
from flex_model.core.inference import Form, Inference, Spot
from flex_model.core.names import Names
from flex_model.core.save_ctx import SaveContext
from flex_model.core.trainable import TrainableModules
from flex_model.engines import Engines
from flex_model.errors import DeliveryError, EditError, LayoutError
from flex_model.layout.claim import Claim
from flex_model.layout.layout import Layout
from flex_model.layout.mesh import ModelMesh
from flex_model.routing.collectives import all_gather_ints, all_gather_objects
from flex_model.routing.delivery import Item, deliver
from flex_model.routing.route import gradient_scale
from flex_model.trees import tensors

__all__ = ["Runtime"]

logger = logging.getLogger(__name__)


class Runtime:
    """Everything FlexModel keeps about one wrapped model. Hooks hold this, never the FlexModel itself."""

    def __init__(
        self, module: nn.Module, *, mesh: DeviceMesh | None, device: torch.device | None, mean: bool, timeout: timedelta
    ) -> None:
        self.module, self.given_mesh, self.device, self.mean, self.timeout = module, mesh, device, mean, timeout
        self.bounds: list[Bound] = []
        self.groups = Groups()
        self.save_ctx = SaveContext()
        self.modules = TrainableModules()
        self.quiet = False
        self.direct = False  # the forward comes through FlexModel itself
        self.active: ActiveCall | None = None
        self.fast_call: ActiveCall | None = None  # the active call, where the short way of one process is right
        self.last_inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.calls = 0
        self.remembered: WeakValueDictionary[int, ActiveCall] = WeakValueDictionary()  # their graphs hold them
        self.waiting: list[Staged] = []
        self.claims: dict[Form, Claim] = {}
        self.gradient_staged: list[Staged] = []
        self.gradient_claims: dict[Form, Claim] = {}
        self.failures: list[dict[str, Any]] = []
        self.refused: list[tuple[Bound, Any, LayoutError]] = []
        self.backward_call: ActiveCall | None = None
        self.backward_edited = False
        self._before: dict[int, Tensor | None] = {}
        self._handles: list[Any] = []
        self._entry_handles: list[Any] = []
        self._parameter_handles: list[Any] = []
        self._entries_stale = False
        self._backward_id = -1
        self._mark: object = None
        self.refresh()

    # -- the model and its engines -----------------------------------------------------------------------------
    def refresh(self) -> None:
        """Look at the model anew: names, engines, mesh. Layouts found before are forgotten."""
        self.names = Names(self.module)
        self.root = self.names.root
        self.engines = Engines(self.module, self.root)
        self.names.add_hidden(self.engines.hidden_parameters())
        self.mesh: ModelMesh = self.engines.mesh(self.given_mesh, timeout=self.timeout, mean=self.mean)
        self.inference = Inference(self.engines, self.mesh, self.root)
        seed = self.context.seed if hasattr(self, "context") else 0
        self.context = EditContext(self.mesh, self.save_ctx, self.modules, seed)
        if self.mesh.axes:
            self.context.on_failure = self._note_failure
        self.keep_alive = self.engines.keep_alive
        self._mark = self._engine_mark()
        first = next(self.module.parameters(), None)
        self.device_of_values = torch.device("cpu") if first is None else torch.device(first.device.type)

    def _engine_mark(self) -> object:
        """Changes when an engine was applied, or removed, since the last look."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return None
        first = next(self.root.parameters(), None)
        active = None if "DDP" in self.engines.names else DistributedDataParallel._get_active_ddp_module()
        return active, type(self.root), getattr(first, "_spec", None) is not None

    @property
    def lockstep(self) -> bool:
        return self.direct or self.engines.lockstep

    # -- installing --------------------------------------------------------------------------------------------
    def uninstall(self) -> None:
        """Take all hooks off; within a call, those that see its end stay until then."""
        self._entries_stale = self.active is not None
        for handles in (self._handles, self._parameter_handles, [] if self.active else self._entry_handles):
            for handle in handles:
                handle.remove()
            handles.clear()

    def install(self) -> None:
        """Put the enabled hooks on the model, and nothing where none is enabled."""
        self.uninstall()
        enabled = [b for b in self.bounds if b.enabled]
        entries = self._entries(enabled) if enabled and self.active is None else []
        for module in entries:
            self._entry_handles.append(module.register_forward_pre_hook(self.enter, prepend=True, with_kwargs=True))
        by_place: dict[tuple[int, str], list[Bound]] = {}
        self._install_parameters()
        for bound in enabled:
            if bound.side != "param":
                by_place.setdefault((id(bound.module), bound.side), []).append(bound)
        for (_, side), bounds in by_place.items():
            self._install_point(side, bounds)
        for module in entries:
            self._entry_handles.append(module.register_forward_hook(self._left))
            self._entry_handles.append(module.register_forward_hook(self._failed, always_call=True))

    def _entries(self, enabled: list[Bound]) -> list[nn.Module]:
        """Modules whose call may be the outermost: the model, and the parts one or two levels down that hold hooks."""
        found = {"": self.root}
        for bound in enabled:
            parts = bound.name.split(".")
            for depth in (1, 2):
                name = ".".join(parts[:depth])
                module = self.names.modules.get(name)
                if len(parts) > depth and module is not None and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                    found[name] = module
        return list(found.values())

    def _install_point(self, side: str, bounds: list[Bound]) -> None:
        module = bounds[0].module
        point = Point(self, bounds[0].name, side, bounds)
        if side == "in":
            self._handles.append(module.register_forward_pre_hook(point.on_input, with_kwargs=True))
        else:
            hook = fast.output_hook(self, point, bounds) or point.on_output
            self._handles.append(module.register_forward_hook(hook))

    def _install_parameters(self) -> None:
        for handle in self._parameter_handles:
            handle.remove()
        self._parameter_handles.clear()
        for bound in self.bounds:
            if bound.enabled and bound.side == "param":
                owner, attribute = self.names.parameters[bound.name]
                _, site = self.engines.gradient_site(owner, attribute)
                parameter = owner._parameters.get(attribute)
                if site.when == "local" and parameter is not None and parameter.requires_grad:
                    hook = partial(self._on_parameter, bound, dict(site.stated))
                    self._parameter_handles.append(parameter.register_hook(hook))

    # -- calls -------------------------------------------------------------------------------------------------
    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward of an entry module starts; the outermost one is the call."""
        if self.quiet or in_backward() != -1:
            return
        if self.active is not None and self.active.module is not module:
            return
        if self.backward_call is not None:  # a backward that failed
            self._forget_backward()
        if self._engine_mark() != self._mark:
            self.refresh()
            self._install_parameters()
        self.active = ActiveCall(module, self.calls, args, kwargs, torch.is_grad_enabled())
        self.fast_call = None if self.mesh.axes or torch.is_inference_mode_enabled() else self.active
        self.calls += 1
        if self.mesh.axes:
            wanted = {
                (b.name, b.side, repr(b.hook.unpack_idx)): b.module
                for b in self.bounds
                if b.enabled and b.side != "param"
            }
            with self.silent():
                self.inference.begin(module, args, kwargs, wanted)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Forwards in here are nobody's call: no hook of ours does anything."""
        before = self.quiet, self.active, self.fast_call
        self.quiet, self.active, self.fast_call = True, None, None
        try:
            with self.engines.undisturbed():
                yield
        finally:
            self.quiet, self.active, self.fast_call = before

    def call_now(self) -> ActiveCall:
        """The call a firing belongs to; in a recomputation, the one whose backward runs."""
        if self.active is not None:
            return self.active
        if self.backward_call is not None:
            return self.backward_call
        for call in reversed(list(self.remembered.values())):
            return call
        return ActiveCall(self.root, self.calls, (), {})

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        self.leave(module, output)

    def _failed(self, module: nn.Module, args: Any, output: Any) -> None:
        """Runs after ``_left``, and without it where the forward raised."""
        if not self.quiet and self.active is not None and self.active.module is module:
            self.abandon()

    def abandon(self) -> None:
        """The call is over without a result: what it staged goes."""
        self.active = self.fast_call = None
        self.inference.end()
        self.failures.clear()
        self.refused.clear()
        if self._entries_stale:
            self.install()

    def leave(self, module: nn.Module, output: Any) -> None:
        """The forward is over. Deliver what it captured if all ranks are here, or keep it for a later point."""
        call = self.active
        if self.quiet or call is None or call.module is not module or in_backward() != -1:
            return
        self.active = self.fast_call = None
        self.inference.end()
        if self._entries_stale:
            self.install()
        if not self.mesh.axes:
            fast.put_all(call.staged)
        else:
            self.waiting += call.staged
            for form, claim in call.claims.items():
                self.claims.setdefault(form, claim)
            if self.lockstep:
                self.point(edited=call.edited or any(b.selection is not None for b in self.bounds if b.enabled))
        if torch.is_grad_enabled():
            self._arm_outputs(call, output)
        call.staged, call.claims = [], {}
        call.drop_inputs()

    def stage(self, call: ActiveCall, staged: Staged) -> None:
        call.staged.append(staged)

    def keep_on(self, layout: Layout | None) -> torch.device | None:
        """Where a staged value waits: on the user's device at once if nothing has to move between ranks."""
        moves = layout is None or bool(layout.moving_axes)
        return None if moves and self.mesh.axes else self.device

    # -- points ------------------------------------------------------------------------------------------------
    def point(self, *, edited: bool = False) -> None:
        """All ranks are here: settle what was claimed, tell of failures, deliver what waits. Collective."""
        if not self.mesh.axes:
            return
        if self.claims:
            claims, self.claims = self.claims, {}
            self.inference.settle(claims)
        staged, self.waiting = self.waiting, []
        refused, self.refused = self.refused, []
        items = [i for s in staged if (i := self._item(s, refused)) is not None]
        moves = any(i.layout.moving_axes for i in items)
        if edited or moves:
            self._status(items)
        self._deliver(items)
        self._raise_refused(refused)

    def _item(self, staged: Staged, refused: list[tuple[Bound, Any, LayoutError]]) -> Item | None:
        bound, layout = staged.bound, staged.layout
        if layout is None:
            assert staged.form is not None
            found = self.inference.known[staged.form]
            if isinstance(found, LayoutError):
                refused.append((bound, staged.key, found))
                return None
            layout = found
        local, finish = staged.local, None
        if bound.selection is not None and not staged.selected:
            taken = self.select_on_shards(bound, local, layout)
            if taken is not None:
                local, layout = taken
            else:
                finish = bound.selection.take
        sink = bound.gradient_sink if staged.gradient and not bound.is_gradient else bound.sink
        assert sink is not None
        scale = gradient_scale(self.mesh, layout, range(len(self.mesh.axes))) if staged.gradient else 1.0
        key = staged.key

        check = None if bound.selection is not None else partial(check_expected, bound)

        def put(full: Any) -> None:
            sink.put(key, full if not isinstance(full, Tensor) or self.device is None else full.to(self.device))

        return Item(bound.where, local, layout, bound.deliver, put, scale, finish, check)

    def select_on_shards(self, bound: Bound, local: Tensor, layout: Layout) -> tuple[Tensor, Layout] | None:
        """The selection of this rank's shard and its layout; None if it can only be made from the whole."""
        assert bound.selection is not None
        sizes = {i: a.size for i, a in enumerate(self.mesh.axes)}
        new = bound.selection.on_shards(layout, tuple(local.shape), sizes)
        return None if new is None else (bound.selection.take(local), new)

    def _deliver(self, items: list[Item]) -> None:
        if self.device_of_values.type == "cuda":
            torch.cuda.current_stream().synchronize()  # asynchronous copies are readable from here on
        with torch.inference_mode(False):
            deliver(items, self.mesh)

    def _status(self, items: list[Item]) -> None:
        """One small exchange: does everybody hold the same values, and did nobody's edit fail?"""
        mark = crc32("|".join(i.where for i in items).encode())
        rows = all_gather_ints([len(self.failures), len(items), mark], self.mesh.world, self.device_of_values)
        if any(r[0] for r in rows):
            everyone = all_gather_objects(self.failures, self.mesh.world)
            self.failures = []
            first = next(f for theirs in everyone for f in theirs)
            raise EditError(
                f"{first['where']}: the editing function failed on rank {first['rank']} in call {first['call']} with "
                f"{first['error']}; caches, buffers and gradients of this call are undefined.\n{first['traceback']}"
            )
        if len({tuple(r) for r in rows}) > 1:
            counts = dict(zip(self.mesh.ranks, [r[1] for r in rows], strict=True))
            raise DeliveryError(
                f"ranks captured different values in this call (values by rank: {counts}); every rank must register "
                f"the same hooks in the same order and run the same modules."
            )

    def _note_failure(self, bound: Bound, call: Call, error: BaseException) -> None:
        lines = "".join(traceback.format_exception(error))
        self.failures.append(
            {
                "where": bound.where,
                "rank": self.mesh.rank,
                "call": call.index,
                "error": f"{type(error).__name__}: {error}",
                "traceback": lines,
            }
        )

    def refuse(self, bound: Bound, key: Any, error: LayoutError) -> None:
        self.refused.append((bound, key, error))

    def _raise_refused(self, refused: list[tuple[Bound, Any, LayoutError]]) -> None:
        """A refusal is told where the value is asked for, if somebody can ask there; else at once, on every rank."""
        for bound, key, error in refused:
            sink = bound.sink if bound.sink is not None else bound.gradient_sink
            told = getattr(sink, "refuse", None)
            if told is None or bound.edit is not None:
                raise error
            told(key, error)

    def flush(self) -> None:
        """Deliver all that still waits. Collective, also for ranks that hold less than others."""
        if not self.mesh.axes:
            return
        if not self.lockstep_proven:
            self._align()
        self.point(edited=bool(self.failures) or not self.lockstep_proven)

    @property
    def lockstep_proven(self) -> bool:
        return self.engines.lockstep

    def _align(self) -> None:
        """Ranks may have run different numbers of forwards: the k-th value of a key is the k-th on every rank."""
        mine = [(s.bound.where, repr(s.key), str(s.local.dtype), tuple(s.local.shape)) for s in self.waiting]
        everyone = all_gather_objects((mine, {f: None for f in self.claims}), self.mesh.world)
        if all(theirs[0] == everyone[0][0] for theirs in everyone):
            return
        self._pad([theirs[0] for theirs in everyone])

    def _pad(self, everyone: list[list[tuple[str, str, str, tuple[int, ...]]]]) -> None:
        """Stand in with no rows for the values of calls that this rank did not run."""
        by_key: dict[tuple[str, str], list[Staged]] = {}
        for staged in self.waiting:
            by_key.setdefault((staged.bound.where, repr(staged.key)), []).append(staged)
        longest: dict[tuple[str, str], list[Any]] = {}
        for theirs in everyone:
            counted: dict[tuple[str, str], list[Any]] = {}
            for where, key, _, shape in theirs:
                counted.setdefault((where, key), []).append(shape)
            for k, shapes in counted.items():
                if len(shapes) > len(longest.get(k, [])):
                    longest[k] = shapes
        out: list[Staged] = []
        for key, shapes in longest.items():
            own = by_key.get(key, [])
            out += own
            for shape in shapes[len(own) :]:
                if not own:
                    raise DeliveryError(f"{key[0]}: it ran on other ranks but never on rank {self.mesh.rank}.")
                out.append(self._empty(own[0], shape))
        self.waiting = out

    def _empty(self, like: Staged, shape: tuple[int, ...]) -> Staged:
        layout = like.layout or self._settled(like)
        shape_list = list(shape)
        for i in layout.sharded_axes:
            if self.mesh.axes[i].kind == "data":
                shape_list[layout.placements[i].dim] = 0  # type: ignore[attr-defined]
        return Staged(like.bound, like.key, like.local.new_empty(shape_list), like.form, like.layout)

    def _settled(self, staged: Staged) -> Layout:
        if self.claims:
            claims, self.claims = self.claims, {}
            self.inference.settle(claims)
        assert staged.form is not None
        found = self.inference.known[staged.form]
        if isinstance(found, LayoutError):
            raise found
        return found

    # -- backward ----------------------------------------------------------------------------------------------
    def _arm_outputs(self, call: ActiveCall, output: Any) -> None:
        interested = any(b.is_gradient or b.gradient_sink is not None or b.edit is not None for b in self.bounds if b.enabled)
        if not interested and not len(self.modules):
            return
        self.remembered[call.index] = call
        for tensor in tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(partial(self._on_output_gradient, call))

    def _on_output_gradient(self, call: ActiveCall, grad: Tensor) -> None:
        if self.backward_call is not None and self._backward_id != in_backward():  # of a backward that failed
            self._forget_backward()
        self.arm(call)

    def _forget_backward(self) -> None:
        self.backward_call, self.backward_edited = None, False
        self.gradient_staged, self.gradient_claims = [], {}
        self._before.clear()

    def arm(self, call: ActiveCall) -> None:
        """The backward of ``call`` has begun; be called when the outermost backward is done, after the engines are."""
        first = self.backward_call is None
        self.backward_call = call
        if not first:
            return
        self._backward_id = in_backward()
        for bound in self._finished_parameters():
            owner, attribute = self.names.parameters[bound.name]
            engine, _ = self.engines.gradient_site(owner, attribute)
            assert engine is not None
            self._before[id(bound)] = engine.gradient_before(owner, attribute)
        queue = torch.autograd.Variable._execution_engine.queue_callback
        queue(lambda: queue(self._finish_backward))

    def _finished_parameters(self) -> list[Bound]:
        out = []
        for bound in self.bounds:
            if bound.enabled and bound.hook_type == "tensor":
                owner, attribute = self.names.parameters[bound.name]
                if self.engines.gradient_site(owner, attribute)[1].when == "finished":
                    out.append(bound)
        return out

    def _on_parameter(self, bound: Bound, stated: dict[str, Any], grad: Tensor) -> Tensor | None:
        if self.quiet:
            return None
        call = self.call_now()
        self.arm(call)
        layout = parameter_layout(self, grad, stated)
        form = Form(Spot(bound.name, "param", 0), grad.dim(), True)
        return meet_gradient(self, [(bound, False)], 0, form, layout, call, grad)

    def _finish_parameter(self, bound: Bound) -> None:
        owner, attribute = self.names.parameters[bound.name]
        engine, _ = self.engines.gradient_site(owner, attribute)
        assert engine is not None
        full = engine.full_gradient(owner, attribute, self._before.get(id(bound)))
        if full is None:
            return
        bound.fired += 1
        key = bound.key_of(0, False)
        if bound.sink is not None and (bound.deliver != "main" or self.mesh.is_main):
            bound.sink.put(key, full.clone() if self.device is None else full.to(self.device, copy=True))
        if bound.edit is not None:
            self.backward_edited = True
            with self.modules.inside_edit():
                out = bound.edit(bound.module, full, self.save_ctx, self.modules, bound.site(0), None)
            if out is not None:
                engine.add_to_gradient(owner, attribute, out - full)

    def _finish_backward(self) -> None:
        call, self.backward_call = self.backward_call, None
        edited, self.backward_edited = self.backward_edited, False
        for bound in self._finished_parameters():
            self._finish_parameter(bound)
        self._before.clear()
        if call is not None:
            call.snapshots.clear()
        staged, self.gradient_staged = self.gradient_staged, []
        if not self.mesh.axes:
            fast.put_all(staged)
            return
        claims, self.gradient_claims = self.gradient_claims, {}
        if claims:
            self.inference.settle(claims)
        refused, self.refused = self.refused, []
        items = []
        for one in staged:
            known = self.inference.known.get(one.form) if one.form is not None else None
            if isinstance(known, LayoutError):
                refused.append((one.bound, one.key, known))
            elif (item := self._item(one, refused)) is not None:
                items.append(item)
        if edited or any(i.layout.moving_axes for i in items):
            self._status(items)
        self._deliver(items)
        self.modules.mean_gradients(self.mesh)
        self._raise_refused(refused)

    def stage_gradient(self, staged: Staged) -> None:
        self.gradient_staged.append(staged)
