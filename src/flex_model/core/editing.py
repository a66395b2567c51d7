"""Running an editing function on a value: on every rank, on one, or on the shards as they lie."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils import checkpoint

from flex_model.core.agreeing.same_answer import check_same_answer
from flex_model.core.bound import Bound, check_expected
from flex_model.core.guarded import Guarded
from flex_model.core.hook_function import Call
from flex_model.errors import EditError, ShapeError, summary
from flex_model.layout.layout import Layout
from flex_model.layout.mesh import ModelMesh
from flex_model.routing.delivery import exchange_shapes
from flex_model.routing.one_rank import OneRankRoute, tie, use_parameters
from flex_model.routing.part import NeedsTheWhole, Part
from flex_model.routing.route import (
    Route,
    gradient_scale,
    scale_gradient,
    with_part_of_gradient,
    with_whole_gradient,
)
from flex_model.routing.straight import dtensor_holds, straight_layout, straighten, unstraighten

__all__ = ["EditContext", "check_answer", "refuse_write", "run_edit", "run_on_part", "seeded"]


# How torch ends a recomputation once all is there that the backward needs, in whatever operation saves the last of it.
_ENDS_RECOMPUTATION: tuple[type[BaseException], ...] = tuple(
    e for e in (getattr(checkpoint, "_StopRecomputationError", None),) if e is not None
)


class EditContext:
    """What editing functions get besides the value, and where their failures go."""

    def __init__(self, mesh: ModelMesh, save_ctx: Any, modules: Any, seed: int) -> None:
        self.mesh, self.save_ctx, self.modules, self.seed = mesh, save_ctx, modules, seed
        self.check = bool(os.environ.get("FLEX_MODEL_CHECK"))  # check mode: slower, finds what is only sometimes wrong
        self.even_axes: frozenset[int] = frozenset()
        self.on_failure: Callable[[Bound, Call, BaseException], None] | None = None


@contextmanager
def seeded(seed: int, site: tuple[Any, ...], call: int | tuple[int, int], device: torch.device) -> Iterator[None]:
    """Random numbers that depend on the seed, the site and the call alone; the model's own state is untouched."""
    mark = hashlib.blake2b(repr((seed, *site, call)).encode(), digest_size=7).digest()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int.from_bytes(mark, "big"))
        yield


def run_edit(
    bound: Bound, context: EditContext, local: Tensor, layout: Layout, index: int, call: Call
) -> tuple[Tensor | None, Tensor | None]:
    """(the local value to go on with, or None for unchanged; the full value before the edit, if it was made)."""
    run = {"every_rank": _every_rank, "one_rank": _one_rank, "sharded": _sharded}[bound.hook.run]
    if not context.mesh.axes and bound.hook.run != "sharded":
        run = _every_rank
    if not layout.late:
        return run(bound, context, local, layout, index, call)
    mesh = context.mesh
    out, whole = run(bound, context, with_part_of_gradient(local, mesh, layout), layout, index, call)
    return (None if out is None else with_whole_gradient(out, mesh, layout)), whole


def run_on_part(bound: Bound, context: EditContext, local: Tensor, layout: Layout, call: Call) -> Tensor | None:
    """The answer of an edit that needs no more than this rank's own part; None where it does."""
    if bound.on_part is None or bound.apart or context.check or not context.mesh.axes:
        return None
    known = bound.part
    if known is None or known[0] is not layout or known[1] != local.shape:
        known = bound.part = layout, local.shape, Part.of(local, layout, context.mesh)
    if known[2] is None:
        return None
    try:
        out = bound.on_part(local, known[2])
        check_answer(bound, local, out)
    except NeedsTheWhole:
        return None
    except Exception as error:
        _fail(bound, context, call, error)
        return local
    return out


def _fail(bound: Bound, context: EditContext, call: Call, error: Exception) -> None:
    """Keep a failure for the next point that all ranks pass; raised at once where there is none, where the other ranks
    have it too, and where it is none."""
    if context.on_failure is None or isinstance(error, _ENDS_RECOMPUTATION):
        raise error
    if bound.alike:
        raise EditError(
            f"{bound.where}: {bound.hook.editing_function!r} failed, as on every rank, with {summary(error)}",
            page=getattr(error, "page", ""),
        ) from error
    context.on_failure(bound, call, error)


def _call(bound: Bound, context: EditContext, full: Tensor, index: int, call: Call) -> Tensor | None:
    """The editing function's answer, checked. A failure is kept for the next point all ranks pass, if there is one."""
    try:
        return _answer(bound, context, full, index, call)
    except Exception as error:
        _fail(bound, context, call, error)
        return full


def _answer(bound: Bound, context: EditContext, full: Tensor, index: int, call: Call) -> Tensor | None:
    assert bound.edit is not None and bound.module is not None
    if bound.apart:
        return _answer_flat(bound, context, full, index, call)
    problem = check_expected(bound, full)
    if problem:
        raise ShapeError(problem)
    if context.check:
        from flex_model.check.trial import try_first  # it uses what is here

        try_first(bound, context, full, index, call)
    selection = bound.selection
    value = full if selection is None else selection.take(full)
    if bound.hook.random and not isinstance(full, DTensor):
        value = value.contiguous()  # torch draws in the order of the memory, and what was gathered has no other
    live = value
    if bound.may_write and not isinstance(full, DTensor):
        value = value.clone()  # others may use this memory
    version = None if value.is_inference() else value._version
    site = bound.site(index)
    generator: AbstractContextManager[Any] = nullcontext()
    if bound.hook.random:
        mark = call.index if not call.microbatch else (call.index, call.microbatch)
        generator = seeded(context.seed, (bound.name, bound.hook_type, index), mark, full.device)
    before = torch.get_rng_state() if context.check and not bound.hook.random else None
    with generator, context.modules.inside_edit():
        out = bound.edit(bound.module, value, context.save_ctx, context.modules, site, call)
    if before is not None and not torch.equal(before, torch.get_rng_state()):
        raise EditError(
            f"{bound.where}: the editing function draws random numbers; pass random=True to the HookFunction.",
            page="edit-draws-random",
        )
    if out is None:
        if version is None or value._version == version:
            return None
        out = value  # it was written in place
    if value is live and version is not None and value._version != version and not isinstance(full, DTensor):
        refuse_write(bound)
    check_answer(bound, value, out)
    edited: Tensor = out
    return edited if selection is None else selection.put(full, edited)


def _answer_flat(bound: Bound, context: EditContext, full: Tensor, index: int, call: Call) -> Tensor | None:
    """The answer to a value whose dim 0 was taken apart to bring it here."""
    if isinstance(full, DTensor):
        raise EditError(
            f"{bound.where}: dim 0 is two dims in one, whose shards are interleaved; run='every_rank' gives it whole.",
            page="edit-not-sharded",
        )
    out = _answer(replace(bound, apart=False), context, full.flatten(0, 1), index, call)
    return None if out is None else out.unflatten(0, full.shape[:2])


def refuse_write(bound: Bound) -> None:
    """The function wrote into memory that the model uses, where it did not look as if it would."""
    raise EditError(
        f"{bound.where}: the editing function wrote into its input in place, out of this library's sight; "
        f"let it return a new tensor, or start it with x = x.clone().",
        page="edit-writes-in-place",
    )


def check_answer(bound: Bound, value: Tensor, out: object) -> None:
    if not isinstance(out, Tensor):
        raise ShapeError(
            f"{bound.where}: the editing function returned {type(out).__name__}; expected a tensor or None.",
            page="edit-answer",
        )
    if out.shape != value.shape:
        raise ShapeError(
            f"{bound.where}: the editing function returned the shape {tuple(out.shape)}, "
            f"expected {tuple(value.shape)}; an edit must keep the shape.",
            page="edit-answer",
        )
    if out.dtype != value.dtype:
        raise ShapeError(
            f"{bound.where}: the editing function returned {out.dtype}, expected {value.dtype}; "
            f"end it with .to(x.dtype).",
            page="edit-answer",
        )


Outcome = tuple[Tensor | None, Tensor | None]


def _every_rank(bound: Bound, context: EditContext, local: Tensor, layout: Layout, index: int, call: Call) -> Outcome:
    route = (
        Route(context.mesh, layout, local, axes=bound.axes, even_axes=context.even_axes) if context.mesh.axes else None
    )
    if route is not None and any(context.mesh.axes[i].kind == "tensor" for i in layout.parted):
        with context.modules.replaced(context.modules.kept_apart() if torch.is_grad_enabled() else []):
            return _call(bound, context, local, index, call), local
    if route is None or route.trivial:
        out = _call(bound, context, local, index, call)
        return out, local
    full = route.unshard(local)
    out = _call(bound, context, full, index, call)
    if context.check:
        check_same_answer(bound, context.mesh, full if out is None else out)
    whole = full if bound.axes is None and not route.own_part else None
    return (None if out is None else route.reshard(out)), whole


def _one_rank(bound: Bound, context: EditContext, local: Tensor, layout: Layout, index: int, call: Call) -> Outcome:
    mesh, modules = context.mesh, context.modules
    scale = gradient_scale(mesh, layout, range(len(mesh.axes)))
    route = OneRankRoute(mesh, layout, local)
    entered = scale_gradient(local, scale)
    full = route.unshard(entered)
    parameters = modules.trainable_tensors() if torch.is_grad_enabled() else []
    used = use_parameters(mesh, parameters)
    if route.here:
        with modules.replaced(used):
            out = _call(bound, context, full, index, call)
        out = full if out is None else out
        if torch.is_grad_enabled():
            out = tie(out, full, *used)
    else:
        out = tie(full, *used) if used else full
    back = route.reshard(out, local)
    return scale_gradient(back, 1 / scale), None


def _sharded(bound: Bound, context: EditContext, local: Tensor, layout: Layout, index: int, call: Call) -> Outcome:
    mesh = context.mesh
    if not mesh.axes:
        return _call(bound, context, local, index, call), local
    route = Route(mesh, layout, local, even_axes=context.even_axes)
    device_mesh = mesh.device_mesh(local.device.type)
    scale = gradient_scale(mesh, layout, range(len(mesh.axes)))
    shape, placements = torch.Size(route.full_shape), straight_layout(layout).placements
    value = DTensor.from_local(
        straighten(scale_gradient(local, scale), layout, mesh),
        device_mesh,
        placements,
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )
    ragged = any(layout.ragged[i] and i not in context.even_axes for i in layout.sharded_axes)
    own_sizes = ragged and not dtensor_holds(layout, mesh, shape, exchange_shapes([tuple(local.shape)], mesh)[0])
    with Guarded(bound.where, value if own_sizes else None), context.modules.as_dtensors(device_mesh):
        out = _call(bound, context, value, index, call)
    if out is None:
        return None, None
    if not isinstance(out, DTensor):
        raise EditError(
            f"{bound.where}: an edit with run='sharded' must return a DTensor, got {type(out).__name__}.",
            page="edit-not-sharded",
        )
    if out.placements != placements:
        if own_sizes:
            raise EditError(
                f"{bound.where}: the answer must be sharded as the value is, {placements}; it is {out.placements}.",
                page="edit-not-sharded",
            )
        out = out.redistribute(placements=placements)
    back = unstraighten(out.to_local(), layout, mesh)
    return scale_gradient(back, 1 / scale), None
