"""What happens when a site fires: capture the value as it is met, edit it, watch its gradient."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flex_model.core.bound import Bound, check_expected
from flex_model.core.call import ActiveCall, Staged, in_backward
from flex_model.core.editing import run_edit, run_on_part
from flex_model.core.gradients import claim_layout, form_of, watch_gradient
from flex_model.core.hook_function import Call
from flex_model.core.inference import Form
from flex_model.core.local import like, plain
from flex_model.core.ragged import gathered, give, identified, refusal, whole_experts
from flex_model.errors import EditError, LayoutError, ShapeError
from flex_model.layout.layout import Layout
from flex_model.routing.collectives import extremes
from flex_model.routing.one_rank import tie
from flex_model.routing.route import Route, with_part_of_gradient, with_whole_gradient
from flex_model.routing.rows import Gathered
from flex_model.routing.selection import Selection
from flex_model.trees import Leaf, find_leaves, input_leaves, replace_leaves, resolve_index

if TYPE_CHECKING:
    from flex_model.core.runtime import Runtime

__all__ = ["Point"]


class Point:
    """All hooks on one side of one module, in the order of registration; gradient hooks come after the others."""

    def __init__(self, runtime: Runtime, name: str, side: str, bounds: Sequence[Bound]) -> None:
        self.runtime, self.name, self.side = runtime, name, side
        self.values = [b for b in bounds if not b.is_gradient]
        self.gradients = [b for b in bounds if b.is_gradient or b.gradient_sink is not None]
        self.by_path = any(not isinstance(b.hook.unpack_idx, int) for b in bounds)
        module = bounds[0].module
        self.apart = bool(runtime.mesh.axes) and module is not None and runtime.engines.flattens(module, side)
        for bound in bounds:
            bound.apart = self.apart

    # -- torch's hooks -----------------------------------------------------------------------------------------
    def on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.runtime.quiet:
            return None
        leaves = input_leaves(module, args, kwargs) if self.by_path else find_leaves((args, kwargs))
        new = self.visit(module, leaves, (args, kwargs), (args, kwargs))
        return replace_leaves((args, kwargs), new) if new else None

    def on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.runtime.quiet:
            return None
        leaves = [Leaf(0, "", output)] if isinstance(output, Tensor) else find_leaves(output)
        new = self.visit(module, leaves, args, output)
        return replace_leaves(output, new) if new else None

    def visit(self, module: nn.Module, leaves: list[Leaf], inputs: Any, value: Any) -> dict[int, Tensor]:
        """The tensors to put in the place of others, by index."""
        runtime = self.runtime
        alone = runtime.active is None and in_backward() == -1
        if alone:  # a part of the model was called by itself
            runtime.enter(module, inputs if isinstance(inputs, tuple) else (inputs,), {})
        call = runtime.call_now()
        occurrence = runtime.inference.passes(self.name, self.side)
        inner = runtime.engines.inner_rows(module, inputs) if self.apart else 1
        now = {x.index: x.tensor.unflatten(0, (-1, inner)) if self.apart else x.tensor for x in leaves}
        new: dict[int, Tensor] = {}
        values, gradients = self.values, self.gradients
        if in_backward() != -1:
            values, gradients = ([b for b in bounds if b in call.bounds] for bounds in (values, gradients))
        for bound in values:
            chosen = resolve_index(leaves, bound.hook.unpack_idx)
            if not chosen:
                _tell_nothing(bound, value, leaves)
            for leaf in chosen:
                out = fire(
                    runtime,
                    bound,
                    Leaf(leaf.index, leaf.path, now[leaf.index]),
                    call,
                    occurrence,
                    len(chosen) > 1,
                )
                if out is not None:
                    now[leaf.index] = new[leaf.index] = out
        if gradients and torch.is_grad_enabled():
            for index, watchers in _watched(gradients, leaves).items():
                out = watch_gradient(runtime, watchers, index, now[index], call, occurrence, self.side)
                if out is not None:
                    new[index] = out
        elif gradients:
            for bound in gradients:
                bound.met = "it ran with gradients turned off"
            if call.checkpointed and runtime.mesh.axes:  # they are watched in the recomputation
                for index, watchers in _watched(gradients, leaves).items():
                    self._claim(watchers[0][0], index, now[index], call, occurrence)
        if alone:
            runtime.leave(module, None)
        return {i: t.flatten(0, 1) for i, t in new.items()} if self.apart else new

    def _claim(self, bound: Bound, index: int, value: Tensor, call: ActiveCall, occurrence: int) -> None:
        rows = gathered(bound, value, call)
        form = form_of(self.runtime, bound, index, value, occurrence, rows)
        claim_layout(self.runtime, bound, form, value, call, occurrence, rows, now=False)


def _watched(gradients: Sequence[Bound], leaves: list[Leaf]) -> dict[int, list[tuple[Bound, bool]]]:
    table: dict[int, list[tuple[Bound, bool]]] = {}
    for bound in gradients:
        chosen = resolve_index(leaves, bound.hook.unpack_idx)
        if not chosen:
            bound.met = f"its {bound.side}put has {len(leaves)} tensors, none at {bound.hook.unpack_idx!r}"
        for leaf in chosen:
            table.setdefault(leaf.index, []).append((bound, len(chosen) > 1))
    return table


def _tell_nothing(bound: Bound, value: Any, leaves: Sequence[Leaf]) -> None:
    """The value has no tensor where the hook looks for one: said where it is asked for, or else once as a warning."""
    kind = "(args, kwargs)" if bound.side == "in" else type(value).__name__
    reason = f"its {bound.side}put is {kind} with {len(leaves)} tensors, none at unpack_idx={bound.hook.unpack_idx!r}"
    told, before = getattr(bound.sink, "empty", None), bound.told
    bound.told = True
    if told is not None:
        told(bound.key, reason)
    elif not before:
        warnings.warn(f"the hook on {bound.where} has nothing to do: {reason}.", stacklevel=2)


def fire(runtime: Runtime, bound: Bound, leaf: Leaf, call: ActiveCall, occurrence: int, several: bool) -> Tensor | None:
    """Capture and edit one value; the tensor to go on with, or None for the one that came."""
    recomputed = in_backward() != -1
    if not recomputed:
        bound.fired += not call.idle
        runtime.watch.passed = bound
    value, rows = leaf.tensor, gathered(bound, leaf.tensor, call)
    form = form_of(runtime, bound, leaf.index, value, occurrence, rows)
    needed_now = bound.edit is not None or bound.attached
    with runtime.watch.at(bound) if needed_now else nullcontext():  # ranks may meet here
        layout = claim_layout(runtime, bound, form, value, call, occurrence, rows, now=needed_now)
        if isinstance(layout, Layout):
            layout = refusal(runtime, bound, value, layout) or layout
        if isinstance(layout, LayoutError):
            if not recomputed and bound.edit is not None and rows is not None and runtime.installed.uneven:
                runtime.outbox.status.note_failure(bound, Call(call.index), layout)  # other ranks may not have met it
            elif not recomputed:
                runtime.outbox.refuse(bound, bound.key_of(leaf.index, several), layout)
            return None
        capturing = bound.sink is not None and not recomputed
        if not needed_now:
            key = bound.key_of(leaf.index, several)
            if capturing:
                _stage(runtime, bound, plain(value.detach()), form, layout, call, key, rows)
            return None
        assert layout is not None
        return _edit(runtime, bound, leaf, form, layout, call, capturing, several, recomputed, rows)


def _stage(
    runtime: Runtime,
    bound: Bound,
    local: Tensor,
    form: Form,
    layout: Layout | None,
    call: ActiveCall,
    key: Any,
    rows: Gathered | None = None,
) -> None:
    if bound.deliver == "shards" and (rows is not None or (layout is not None and call.place is None)):
        runtime.outbox.hand_over(bound, key, local, layout, rows=rows is not None)
        return
    selected, finish = False, None
    batch = runtime.inference.batch_of(form) if call.place is not None else None
    if rows is not None:
        local = rows.take(local)
    if bound.selection is not None and layout is not None and call.place is None:
        if not runtime.mesh.axes and (problem := check_expected(bound, local)):
            raise ShapeError(problem)
        try:
            taken = runtime.outbox.select_on_shards(bound, local, layout)
        except Exception as error:
            if not runtime.whole.axes:
                raise
            runtime.outbox.status.note("select", bound.where, error, call.index)
            return
        if taken is not None:
            (local, layout, finish), selected = taken, True
    copy, room = _copied(runtime, bound, local, layout, simple=rows is None and call.place is None)
    staged = Staged(bound, key, copy, form, layout, selected=selected)
    staged.finish, staged.room = finish, room
    staged.microbatch, staged.occurrence, staged.batch = call.microbatch, form.spot.occurrence, batch
    staged.rows = () if rows is None else (rows,)
    runtime.stage(call, staged)


def _copied(
    runtime: Runtime, bound: Bound, local: Tensor, layout: Layout | None, *, simple: bool
) -> tuple[Tensor, Tensor | None]:
    """A copy of this rank's shard, in its place in the full tensor if that will be here; and the full tensor."""
    if layout is not None and simple and bound.deliver == "main" and runtime.whole is runtime.mesh:
        if not runtime.mesh.is_main and not layout.moving_axes:  # another rank has the same
            return local.new_empty(()).expand(local.shape), None
        if runtime.mesh.is_main and (runtime.device is None or runtime.device.type == "cpu"):
            placed = runtime.copies.take_to_place(local, layout, runtime.mesh)
            if placed is not None:
                return placed
    return runtime.copies.take(local, runtime.keep_on(layout)), None


def _edit(
    runtime: Runtime,
    bound: Bound,
    leaf: Leaf,
    form: Form,
    layout: Layout,
    call: ActiveCall,
    capturing: bool,
    several: bool,
    recomputed: bool,
    rows: Gathered | None,
) -> Tensor | None:
    value, key = leaf.tensor, bound.key_of(leaf.index, several)
    if capturing and not bound.attached:
        _stage(runtime, bound, plain(value.detach()), form, layout, call, key, rows)
    if bound.attached:
        return _attach(runtime, bound, value, layout, key, capturing, call, rows)
    if not recomputed:  # its forward has met the others
        _check_lockstep(runtime, bound, layout, call)
    call.edited = call.edited or not bound.alike
    whole = plain(value)
    if rows is None:
        part = run_on_part(bound, runtime.context, whole, layout, Call(call.index, call.microbatch))
        if part is not None:
            return like(_kept_alive(runtime, part, whole), value)
    if not recomputed and layout.moving_axes and runtime.lockstep and bound.hook.run != "sharded":
        runtime.outbox.status.edits.append(bound.where)
    runtime.context.even_axes = _even_axes(runtime, layout, call, bound.axes)
    description = (
        call.describe(whole_experts(runtime, layout, rows)) if bound.wants_call else Call(call.index, call.microbatch)
    )
    snapshot_key = (id(bound), leaf.index)
    local = whole if rows is None else rows.take(whole)
    state = call.recall(snapshot_key, local) if recomputed else None
    if state is not None:
        with runtime.save_ctx.replayed(state):
            out, _ = run_edit(bound, runtime.context, local, layout, leaf.index, description)
    else:
        if not recomputed and call.checkpointed:
            call.remember(snapshot_key, local, runtime.save_ctx.snapshot())
        out, _ = run_edit(bound, runtime.context, local, layout, leaf.index, description)
    if out is None:
        return None
    out = _kept_alive(runtime, out, local)
    if rows is not None:
        out = rows.put(whole, out)
    return like(out, value)


def _kept_alive(runtime: Runtime, out: Tensor, local: Tensor) -> Tensor:
    """The answer, tied to the value: DDP's reducer waits for every parameter, also where the edit cut the graph."""
    return tie(out, local) if runtime.keep_alive and torch.is_grad_enabled() and local.requires_grad else out


def _attach(
    runtime: Runtime,
    bound: Bound,
    value: Tensor,
    layout: Layout,
    key: Any,
    capturing: bool,
    call: ActiveCall,
    rows: Gathered | None,
) -> Tensor | None:
    """Hand out the full value with its graph, and let the model go on from it, so that gradients reach it."""
    local, selection = plain(value), bound.selection
    through = selection is not None and selection.of_gradients  # the model goes on from what is handed out
    out = None
    if not runtime.mesh.axes:
        full = local.clone()
        out, back = _through(selection, full) if through else (None, full.clone())
    else:
        runtime.mesh.prepare()
        route = Route(runtime.mesh, layout, local, even_axes=_even_axes(runtime, layout, call))
        full = route.unshard(with_part_of_gradient(local, runtime.mesh, layout)).clone()
        out, back = _through(selection, full) if through else (None, full.clone())
        back = with_whole_gradient(route.reshard(back), runtime.mesh, layout)
    if capturing and bound.sink is not None:
        told = full.flatten(0, 1) if bound.apart else full
        if out is None:
            out = told if selection is None else selection.take(told)
        alone = rows is not None and all(a.kind != "data" for a in runtime.mesh.axes)
        give(bound.sink, key, identified(out, rows) if alone and rows is not None else out)
    return like(back, value)


def _through(selection: Selection | None, full: Tensor) -> tuple[Tensor, Tensor]:
    """A selection, and the value put together from it and the rest."""
    assert selection is not None
    out = selection.take(full)
    return out, selection.put(full, out)


def _check_lockstep(runtime: Runtime, bound: Bound, layout: Layout, call: ActiveCall) -> None:
    if not runtime.mesh.axes or bound.hook.run == "sharded":
        return
    with torch.set_grad_enabled(call.grad_mode):  # checkpointing turns gradients off in a training step
        if runtime.lockstep:
            return
    needs = [
        runtime.mesh.names[i]
        for i in layout.sharded_axes
        if runtime.mesh.axes[i].kind == "data" and i not in layout.parted and (bound.axes is None or i in bound.axes)
    ]
    call.crossed = call.crossed or bool(needs)
    if needs and not runtime.direct and call.place is None:
        raise EditError(
            f"{bound.where}: the edit needs the whole batch over {needs}, but ranks do not run in lockstep here "
            f"(generate or evaluation under {runtime.engines.names}); pass axes= without {needs}, or run='sharded'.",
            page="edit-needs-lockstep",
        )


def _even_axes(
    runtime: Runtime, layout: Layout, call: ActiveCall, axes: tuple[int, ...] | None = None
) -> frozenset[int]:
    """Axes along which all input shapes are equal in this call; asked once a call, when a data axis is first needed."""
    mesh = runtime.mesh
    met = [i for i in layout.sharded_axes if i not in layout.parted and (axes is None or i in axes)]
    if not any(mesh.axes[i].kind == "data" for i in met):
        return frozenset()
    if call.even_axes is None:
        low, high = extremes(torch.tensor([call.shapes_mark()]), mesh.world)
        equal = torch.equal(low, high)
        call.even_axes = frozenset(range(len(mesh.axes))) if equal else frozenset()
    return call.even_axes
