"""What happens when a site fires: capture the value as it is met, edit it, watch its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from flex_model.core.bound import Bound, check_expected
from flex_model.core.call import ActiveCall, Staged, in_backward
from flex_model.core.editing import run_edit
from flex_model.core.hook_function import Call
from flex_model.core.inference import Form, Spot
from flex_model.errors import EditError, LayoutError, ShapeError
from flex_model.layout.claim import Claim
from flex_model.layout.layout import Layout, shard_dim
from flex_model.layout.values import digest
from flex_model.routing.collectives import all_gather_ints
from flex_model.routing.delivery import to_host
from flex_model.routing.one_rank import tie
from flex_model.routing.route import Route, gradient_scale
from flex_model.trees import Leaf, find_leaves, input_leaves, replace_leaves, resolve_index

__all__ = ["Point"]


class Point:
    """All hooks on one side of one module, in the order of registration; gradient hooks come after the others."""

    def __init__(self, runtime: Any, name: str, side: str, bounds: Sequence[Bound]) -> None:
        self.runtime, self.name, self.side = runtime, name, side
        self.values = [b for b in bounds if not b.is_gradient]
        self.gradients = [b for b in bounds if b.is_gradient or b.gradient_sink is not None]
        self.by_path = any(not isinstance(b.hook.unpack_idx, int) for b in bounds)

    # -- torch's hooks -----------------------------------------------------------------------------------------
    def on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.runtime.quiet:
            return None
        leaves = input_leaves(module, args, kwargs) if self.by_path else find_leaves((args, kwargs))
        new = self.visit(module, leaves, (args, kwargs))
        return replace_leaves((args, kwargs), new) if new else None

    def on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.runtime.quiet:
            return None
        leaves = [Leaf(0, "", output)] if isinstance(output, Tensor) else find_leaves(output)
        new = self.visit(module, leaves, args)
        return replace_leaves(output, new) if new else None

    def visit(self, module: nn.Module, leaves: list[Leaf], inputs: Any) -> dict[int, Tensor]:
        """The tensors to put in the place of others, by index."""
        runtime = self.runtime
        alone = runtime.active is None and in_backward() == -1
        if alone:  # a part of the model was called by itself
            runtime.enter(module, inputs if isinstance(inputs, tuple) else (inputs,), {})
        call = runtime.call_now()
        occurrence = runtime.inference.passes(self.name, self.side)
        now = {leaf.index: leaf.tensor for leaf in leaves}
        new: dict[int, Tensor] = {}
        for bound in self.values:
            chosen = resolve_index(leaves, bound.hook.unpack_idx)
            for leaf in chosen:
                out = fire(runtime, bound, Leaf(leaf.index, leaf.path, now[leaf.index]), call, occurrence, len(chosen) > 1)
                if out is not None:
                    now[leaf.index] = new[leaf.index] = out
        if self.gradients and torch.is_grad_enabled():
            for index, watchers in self._watched(leaves).items():
                out = watch_gradient(runtime, watchers, index, now[index], call, occurrence, self.side)
                if out is not None:
                    new[index] = out
        if alone:
            runtime.leave(module, None)
        return new

    def _watched(self, leaves: list[Leaf]) -> dict[int, list[tuple[Bound, bool]]]:
        table: dict[int, list[tuple[Bound, bool]]] = {}
        for bound in self.gradients:
            chosen = resolve_index(leaves, bound.hook.unpack_idx)
            for leaf in chosen:
                table.setdefault(leaf.index, []).append((bound, len(chosen) > 1))
        return table


# -- values ----------------------------------------------------------------------------------------------------
def _plain(value: Tensor) -> Tensor:
    """The local tensor behind ``value``, with its graph."""
    if isinstance(value, DTensor):
        value = value.to_local()
    if isinstance(value, AsyncCollectiveTensor):
        value = value.clone()
    return value


def _like(local: Tensor, value: Tensor) -> Tensor:
    """``local`` in the form of ``value``: a DTensor again where it was one."""
    if not isinstance(value, DTensor):
        return local
    return DTensor.from_local(
        local, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
    )


def _layout(
    runtime: Any, bound: Bound, form: Form, value: Tensor, call: ActiveCall, occurrence: int, *, now: bool
) -> Layout | LayoutError | None:
    """The layout of a value; None where it will be settled at the end of the forward."""
    inference = runtime.inference
    layout = inference.lookup(form)
    if layout is None:
        made: Claim = inference.claim(form, value, bound.module, occurrence, bound.hook.expected_shape)
        if now:
            inference.settle({form: made})
            layout = inference.known[form]
        else:
            call.claims.setdefault(form, made)
    return layout  # type: ignore[no-any-return]


def fire(
    runtime: Any, bound: Bound, leaf: Leaf, call: ActiveCall, occurrence: int, several: bool
) -> Tensor | None:
    """Capture and edit one value; the tensor to go on with, or None for the one that came."""
    recomputed = in_backward() != -1
    if not recomputed:
        bound.fired += 1
    value = leaf.tensor
    form = runtime.inference.form(Spot(bound.name, bound.side, leaf.index, False, bound.override), value)
    needed_now = bound.edit is not None or bound.attached
    layout = _layout(runtime, bound, form, value, call, occurrence, now=needed_now)
    if isinstance(layout, LayoutError):
        if not recomputed:
            runtime.refuse(bound, bound.key_of(leaf.index, several), layout)
        return None
    capturing = bound.sink is not None and not recomputed
    if not needed_now:
        if capturing:
            _stage(runtime, bound, _plain(value.detach()), form, layout, call, bound.key_of(leaf.index, several))
        return None
    assert layout is not None
    return _edit(runtime, bound, leaf, layout, call, capturing, several, recomputed)


def _stage(
    runtime: Any, bound: Bound, local: Tensor, form: Form | None, layout: Layout | None, call: ActiveCall, key: Any
) -> None:
    selected = False
    if bound.selection is not None and layout is not None:
        if not runtime.mesh.axes and (problem := check_expected(bound, local)):
            raise ShapeError(problem)
        taken = runtime.select_on_shards(bound, local, layout)
        if taken is not None:
            (local, layout), selected = taken, True
    runtime.stage(call, Staged(bound, key, to_host(local, runtime.keep_on(layout)), form, layout, selected=selected))


def _edit(
    runtime: Any, bound: Bound, leaf: Leaf, layout: Layout, call: ActiveCall, capturing: bool, several: bool, recomputed: bool
) -> Tensor | None:
    value, key = leaf.tensor, bound.key_of(leaf.index, several)
    if capturing and not bound.attached:
        _stage(runtime, bound, _plain(value.detach()), None, layout, call, key)
    if bound.attached:
        return _attach(runtime, bound, value, layout, key, capturing, call)
    _check_lockstep(runtime, bound, layout)
    call.edited = True
    runtime.context.even_axes = _even_axes(runtime, layout, call)
    description = call.describe() if bound.wants_call else Call(call.index)
    snapshot_key = (id(bound), leaf.index)
    local = _plain(value)
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
    if runtime.keep_alive and torch.is_grad_enabled() and local.requires_grad:
        out = tie(out, local)  # the reducer waits for every parameter, also where the edit cut the graph
    return _like(out, value)


def _attach(
    runtime: Any, bound: Bound, value: Tensor, layout: Layout, key: Any, capturing: bool, call: ActiveCall
) -> Tensor | None:
    """Hand out the full value with its graph, and let the model go on from it, so that gradients reach it."""
    local = _plain(value)
    if not runtime.mesh.axes:
        full = local.clone()
        back = full.clone()
    else:
        runtime.mesh.prepare()
        route = Route(runtime.mesh, layout, local, even_axes=_even_axes(runtime, layout, call))
        full = route.unshard(local).clone()
        back = route.reshard(full.clone())
    if capturing and bound.sink is not None:
        bound.sink.put(key, full if bound.selection is None else bound.selection.take(full))
    return _like(back, value)


def _check_lockstep(runtime: Any, bound: Bound, layout: Layout) -> None:
    if not runtime.mesh.axes or runtime.lockstep or bound.hook.run == "sharded":
        return
    needs = [runtime.mesh.names[i] for i in layout.sharded_axes if runtime.mesh.axes[i].kind == "data" and (bound.axes is None or i in bound.axes)]
    if needs:
        raise EditError(
            f"{bound.where}: the edit needs the whole batch over {needs}, but ranks do not run in lockstep here (generate "
            f"or evaluation under {runtime.engines.names}); pass axes= without {needs}, or run='sharded'."
        )


def _even_axes(runtime: Any, layout: Layout, call: ActiveCall) -> frozenset[int]:
    """Axes along which all input shapes are equal in this call; asked once a call, when a data axis is first needed."""
    mesh = runtime.mesh
    if not any(mesh.axes[i].kind == "data" for i in layout.sharded_axes):
        return frozenset()
    if call.even_axes is None:
        rows = all_gather_ints([call.shapes_mark()], mesh.world, runtime.device_of_values)
        equal = len({r[0] for r in rows}) == 1
        call.even_axes = frozenset(range(len(mesh.axes))) if equal else frozenset()
    return call.even_axes


class _Alias(torch.autograd.Function):
    """The same memory as another tensor of the graph, and no view: FSDP2 and in-place operations cannot take views."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


# -- gradients -------------------------------------------------------------------------------------------------
def watch_gradient(
    runtime: Any, watchers: list[tuple[Bound, bool]], index: int, value: Tensor, call: ActiveCall, occurrence: int, side: str
) -> Tensor | None:
    """An alias of ``value`` whose gradient is met: that of this module alone, whoever else uses the value."""
    if not value.is_floating_point():
        return None
    if not value.requires_grad:
        if not any(b.gradient_sink is not None for b, _ in watchers):
            return None
        value = value.detach().requires_grad_().clone()
    bound = watchers[0][0]
    form = runtime.inference.form(Spot(bound.name, side, index, False, bound.override), value)
    _layout(runtime, bound, form, value, call, occurrence, now=False)
    alias: Tensor = _Alias.apply(value)
    alias.register_hook(partial(on_gradient, runtime, watchers, index, form, call))
    return alias


def on_gradient(
    runtime: Any, watchers: list[tuple[Bound, bool]], index: int, form: Form, call: ActiveCall, grad: Tensor
) -> Tensor | None:
    """The gradient of a value arrives."""
    runtime.arm(call)
    forward = runtime.inference.lookup(form) or runtime.inference.known.get(form)
    if forward is None or isinstance(forward, LayoutError):
        for bound, several in watchers:
            runtime.refuse(bound, bound.key_of(index, several), forward or LayoutError(f"{bound.where}: no layout"))
        return None
    layout = runtime.inference.gradient_layout(forward, grad)
    return meet_gradient(runtime, watchers, index, form, layout, call, grad)


def meet_gradient(
    runtime: Any, watchers: list[tuple[Bound, bool]], index: int, form: Form, layout: Layout, call: ActiveCall, grad: Tensor
) -> Tensor | None:
    """Capture and edit a local gradient; the gradient to go on with, or None for the one that came."""
    scale = gradient_scale(runtime.mesh, layout, range(len(runtime.mesh.axes)))
    new: Tensor | None = None
    verified = _verify_gradient(runtime, form, layout, grad, now=any(b.edit is not None and b.is_gradient for b, _ in watchers))
    for bound, several in watchers:
        now = grad if new is None else new
        key = bound.key_of(index, several)
        if isinstance(verified, LayoutError):
            runtime.refuse(bound, key, verified)
            continue
        sink = bound.sink if bound.is_gradient else bound.gradient_sink
        bound.fired += bound.is_gradient
        if sink is not None:
            local = to_host(_plain(now.detach()), runtime.keep_on(layout))
            runtime.stage_gradient(Staged(bound, key, local, _gradient_form(form), layout, True, selected=True))
        if bound.edit is not None and bound.is_gradient:
            out = _edit_gradient(runtime, bound, index, layout, call, now, scale)
            new = new if out is None else out
    return new


def _edit_gradient(
    runtime: Any, bound: Bound, index: int, layout: Layout, call: ActiveCall, grad: Tensor, scale: float
) -> Tensor | None:
    local = _plain(grad)
    runtime.backward_edited = True
    runtime.context.even_axes = frozenset()
    out, _ = run_edit(bound, runtime.context, local / scale if scale != 1 else local, layout, index, Call(call.index))
    if out is None:
        return None
    return _like(out * scale if scale != 1 else out, grad)


def _gradient_form(form: Form) -> Form:
    return form._replace(spot=form.spot._replace(gradient=True))


def _verify_gradient(runtime: Any, form: Form, layout: Layout, grad: Tensor, *, now: bool) -> Layout | LayoutError | None:
    """Whether what should be equal on several ranks is: asked once a site, at once if an edit needs it."""
    mesh, inference = runtime.mesh, runtime.inference
    if not mesh.axes or not any(isinstance(p, Replicate) for p in layout.placements):
        return layout
    key = _gradient_form(form)
    known = inference.lookup(key)
    if known is not None:
        return known  # type: ignore[no-any-return]
    plain = _plain(grad.detach())
    where = f"gradient of {form.spot.name or '(the model)'} {form.spot.side}put {form.spot.index}"
    made = Claim(
        where, tuple(plain.shape), digest(plain), layout.placements, ("the value's layout",) * len(mesh.axes),
        tuple(None for _ in plain.shape),
    )
    if now:
        inference.settle({key: made})
        return inference.known[key]  # type: ignore[no-any-return]
    runtime.gradient_claims.setdefault(key, made)
    return None


def parameter_layout(runtime: Any, grad: Tensor, stated: dict[str, Any]) -> Layout:
    """The layout of a parameter's local gradient: the engine's word by kind of axis, the DTensor's, else replicated."""
    mesh = runtime.mesh
    placements: list[Any] = [stated.get(a.kind, Replicate()) for a in mesh.axes]
    own = runtime.inference.stated(grad) if isinstance(grad, DTensor) else {}
    for axis, (placement, _) in own.items():
        placements[axis] = placement
    if not mesh.mean:
        placements = [Partial("sum") if isinstance(p, Partial) else p for p in placements]
    ragged = tuple(shard_dim(p) is not None for p in placements)
    return Layout(tuple(placements), "the parameter", tuple(grad.shape), ragged)

