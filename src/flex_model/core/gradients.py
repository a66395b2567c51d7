"""Meeting gradients: of values, on aliases of them, and of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.placement_types import Placement

from flex_model.core.bound import WATCHED, Bound, check_expected
from flex_model.core.call import ActiveCall, Staged
from flex_model.core.editing import run_edit, run_on_part
from flex_model.core.hook_function import Call
from flex_model.core.inference import Form, Spot, placements_on
from flex_model.core.local import like, plain
from flex_model.core.ragged import gathered, parted, refusal, whole_experts
from flex_model.core.unfired.missed import mark_watched
from flex_model.errors import LayoutError, ShapeError
from flex_model.layout.claim import Claim
from flex_model.layout.layout import Layout, shard_dim
from flex_model.layout.mesh import AxisKind
from flex_model.layout.values import digest
from flex_model.routing.route import gradient_scale
from flex_model.routing.rows import Gathered

if TYPE_CHECKING:
    from flex_model.core.runtime import Runtime

__all__ = ["claim_layout", "form_of", "meet_gradient", "parameter_layout", "watch_gradient"]


def claim_layout(
    runtime: Runtime,
    bound: Bound,
    form: Form,
    value: Tensor,
    call: ActiveCall,
    occurrence: int,
    rows: Gathered | None = None,
    *,
    now: bool,
) -> Layout | LayoutError | None:
    """The layout of a value; None where it will be settled at the end of the forward."""
    inference = runtime.inference
    if call.place is not None:
        inference.batch_of(form)  # noted while the probe's findings are at hand
    layout = inference.lookup(form)
    if layout is None:
        assert bound.module is not None
        own = parted(runtime, bound, rows)
        made: Claim = inference.claim(form, value, bound.module, occurrence, bound.hook.expected_shape, own)
        if now and own:
            inference.settle_alone(form, made)
            layout = inference.known[form]
        elif now:
            inference.settle({form: made})
            layout = inference.known[form]
        else:
            call.claims.setdefault(form, made)
    return layout  # type: ignore[no-any-return]


def form_of(runtime: Runtime, bound: Bound, index: int, value: Tensor, occurrence: int, rows: Gathered | None) -> Form:
    """The form under which a value's layout is kept; of rows at experts all firings have the same."""
    kind = "" if rows is None else "ordered" if rows.ordered else "parted"
    spot = Spot(bound.name, bound.side, index, False, bound.override, occurrence if rows is None else 0, kind)
    return runtime.inference.form(spot, value)


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
    runtime: Runtime,
    watchers: list[tuple[Bound, bool]],
    index: int,
    value: Tensor,
    call: ActiveCall,
    occurrence: int,
    side: str,
) -> Tensor | None:
    """An alias of ``value`` whose gradient is met: that of this module alone, whoever else uses the value."""
    if not value.is_floating_point():
        _unwatched(watchers, f"it is {value.dtype}, which has no gradient")
        return None
    if not value.requires_grad:
        if not any(b.gradient_sink is not None for b, _ in watchers):
            _unwatched(watchers, "its value does not require a gradient: what it was made from is frozen, or has none")
            return None
        value = value.detach().requires_grad_().clone()
    bound = watchers[0][0]
    rows = gathered(bound, value, call)
    form = form_of(runtime, bound, index, value, occurrence, rows)
    claim_layout(runtime, bound, form, value, call, occurrence, rows, now=False)
    alias: Tensor = _Alias.apply(value)
    alias.register_hook(partial(on_gradient, runtime, watchers, index, form, call, rows))
    for bound, _ in watchers:
        bound.met = WATCHED
    if runtime.missed.walkers:
        mark_watched(watchers, alias)
    return alias


def _unwatched(watchers: list[tuple[Bound, bool]], reason: str) -> None:
    for bound, _ in watchers:
        bound.met = reason


def on_gradient(
    runtime: Runtime,
    watchers: list[tuple[Bound, bool]],
    index: int,
    form: Form,
    call: ActiveCall,
    rows: Gathered | None,
    grad: Tensor,
) -> Tensor | None:
    """The gradient of a value arrives. An error in here ends the backward of this rank alone, so others are told."""
    with runtime.watch.telling():
        runtime.backward.arm(call)
        for bound, _ in watchers:
            bound.reached += 1
        forward = runtime.inference.lookup(form) or runtime.inference.known.get(form)
        if forward is None or isinstance(forward, LayoutError):
            for bound, several in watchers:
                runtime.outbox.refuse(
                    bound,
                    bound.key_of(index, several),
                    forward
                    or LayoutError(
                        f"{bound.where}: the full gradient is unknown, because the layout of its value is.",
                        page="gradient-unknown",
                    ),
                )
            return None
        layout = runtime.inference.gradient_layout(forward, grad)
        return meet_gradient(runtime, watchers, index, form, layout, call, grad, rows)


def meet_gradient(
    runtime: Runtime,
    watchers: list[tuple[Bound, bool]],
    index: int,
    form: Form,
    layout: Layout,
    call: ActiveCall,
    grad: Tensor,
    rows: Gathered | None = None,
) -> Tensor | None:
    """Capture and edit a local gradient; the gradient to go on with, or None for the one that came."""
    scale = gradient_scale(runtime.mesh, layout, range(len(runtime.mesh.axes)))
    new: Tensor | None = None
    verified = _verify_gradient(
        runtime, form, layout, grad, now=any(b.edit is not None and b.is_gradient for b, _ in watchers)
    )
    for bound, several in watchers:
        now = grad if new is None else new
        key = bound.key_of(index, several)
        problem = verified if isinstance(verified, LayoutError) else refusal(runtime, bound, now, layout)
        if problem is not None:
            runtime.outbox.refuse(bound, key, problem)
            continue
        sink = bound.sink if bound.is_gradient else bound.gradient_sink
        bound.fired += bound.is_gradient
        if sink is not None:
            local = plain(now.detach())
            local, selected = _selected(runtime, bound, local if rows is None else rows.take(local))
            local = runtime.copies.take(local, runtime.keep_on(layout))
            staged = Staged(bound, key, local, _gradient_form(form), layout, True, selected=selected)
            staged.microbatch, staged.occurrence = call.microbatch, form.spot.occurrence
            staged.rows = () if rows is None else (rows,)
            if call.place is not None:
                staged.batch = runtime.inference.batch_of(form)
            runtime.backward.stage(staged)
        if bound.edit is not None and bound.is_gradient:
            out = _edit_gradient(runtime, bound, index, layout, call, now, scale, rows)
            new = new if out is None else out
    return new


def _selected(runtime: Runtime, bound: Bound, local: Tensor) -> tuple[Tensor, bool]:
    """On one process the selection, as nothing is done to the value later; whether there is none left to be made.

    The gradient of what a forward hook captures is that of the whole value, but for heads, which are values themselves.
    """
    if not bound.is_gradient and (bound.selection is None or not bound.selection.of_gradients):
        return local, True
    if bound.selection is None or runtime.whole.axes:
        return local, False
    if problem := check_expected(bound, local):
        raise ShapeError(problem)
    return bound.selection.take(local), True


def _edit_gradient(
    runtime: Runtime,
    bound: Bound,
    index: int,
    layout: Layout,
    call: ActiveCall,
    grad: Tensor,
    scale: float,
    rows: Gathered | None,
) -> Tensor | None:
    whole = plain(grad)
    local = whole if rows is None else rows.take(whole)
    given = local / scale if scale != 1 else local
    runtime.backward.edited = runtime.backward.edited or not bound.alike
    if rows is None:
        part = run_on_part(bound, runtime.context, given, layout, Call(call.index, call.microbatch))
        if part is not None:
            return like(part * scale if scale != 1 else part, grad)
    runtime.context.even_axes = frozenset()
    experts = whole_experts(runtime, layout, rows) if bound.wants_call else None
    description = Call(call.index, call.microbatch, experts=experts)
    out, _ = run_edit(bound, runtime.context, given, layout, index, description)
    if out is None:
        return None
    out = out * scale if scale != 1 else out
    return like(out if rows is None else rows.put(whole, out), grad)


def _gradient_form(form: Form) -> Form:
    return form._replace(spot=form.spot._replace(gradient=True))


def _verify_gradient(
    runtime: Runtime, form: Form, layout: Layout, grad: Tensor, *, now: bool
) -> Layout | LayoutError | None:
    """Whether what should be equal on several ranks is: asked once a site, at once if an edit needs it."""
    mesh, inference = runtime.mesh, runtime.inference
    if not mesh.axes or not any(isinstance(p, Replicate) for p in layout.placements):
        return layout
    key = _gradient_form(form)
    known = inference.lookup(key)
    if known is not None:
        return known  # type: ignore[no-any-return]
    local = plain(grad.detach())
    where = f"gradient of {form.spot.place}"
    made = Claim(
        where,
        tuple(local.shape),
        digest(local),
        layout.placements,
        ("the value's layout",) * len(mesh.axes),
        tuple(None for _ in local.shape),
    )
    if now:
        inference.settle({key: made})
        return inference.known[key]  # type: ignore[no-any-return]
    runtime.backward.claims.setdefault(key, made)
    return None


def parameter_layout(runtime: Runtime, grad: Tensor, stated: Mapping[AxisKind, Placement], spec: Any) -> Layout:
    """The layout of a parameter's local gradient: the engine's word by kind of axis, what the gradient or else the
    parameter (``spec``) says, else replicated."""
    mesh = runtime.mesh
    placements: list[Any] = [stated.get(a.kind, Replicate()) for a in mesh.axes]
    spec = grad._spec if isinstance(grad, DTensor) else spec
    own = {} if spec is None else placements_on(mesh, spec.mesh, spec.placements)
    for axis, placement in own.items():
        placements[axis] = placement
    if not mesh.mean:
        placements = [Partial("sum") if isinstance(p, Partial) else p for p in placements]
    ragged = tuple(shard_dim(p) is not None for p in placements)
    return Layout(tuple(placements), "the parameter", tuple(grad.shape), ragged)
