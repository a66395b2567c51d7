"""Delivery: staged local tensors to full tensors where the user wants them.

Everything staged up to a point that all ranks pass moves together: sizes first where they may differ, then the bytes
of distinct shards only, several small values in one message. Replicated values move nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, islice
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from flex_model.errors import LayoutError, ShapeError
from flex_model.layout.mesh import ModelMesh
from flex_model.routing.assembly import Parts, Shapes
from flex_model.routing.collectives import all_gather_ints, extremes
from flex_model.routing.item import Item, each, full_shape
from flex_model.routing.memory import Memory
from flex_model.routing.moves import to_all, to_main
from flex_model.routing.straight import dtensor_holds, straight_layout, straighten

__all__ = ["deliver", "exchange_shapes"]


def deliver(
    items: Sequence[Item], mesh: ModelMesh, memory: Memory, keep: Callable[[Tensor], Tensor], kept: Callable[[], None]
) -> list[tuple[Item, Exception]]:
    """Bring every item where it is wanted. Collective: all ranks of the mesh pass the same items in the same order.

    ``keep`` brings what has arrived to where it is kept, and ``kept`` waits until all of it is there.
    Returns what could not be finished or put away on this rank (by a LayoutError: on every rank); everything else is
    delivered all the same. Raises ShapeError, on every rank and before anything is delivered, where a full shape is not
    the expected one.
    """
    items = [*(i.beside.item for i in items if i.beside is not None), *items]
    moving = [i for i in items if i.layout.moving_axes and i.mode != "shards"]
    asked = [i for i in moving if any(i.layout.ragged)]
    if asked:
        found = exchange_shapes([tuple(i.local.shape) for i in asked], mesh)
        for item, shapes in zip(asked, found, strict=True):
            item.shapes = shapes
    for item in moving:
        if item.shapes is None:
            item.shapes = Shapes([tuple(item.local.shape)], mesh.size)
    for item in items:
        problem = "" if item.check is None else item.check(full_shape(item, mesh))
        if problem:
            raise ShapeError(problem)
    for item in items:
        if item.mode == "local":
            try:
                item.full = _as_dtensor(item, mesh, keep)
            except LayoutError as error:
                item.failure = error
        elif item.mode == "shards":
            item.full = item.local
        elif not item.layout.moving_axes and (item.mode == "all" or mesh.is_main):
            item.complete(item.local)
    to_main([i for i in moving if i.mode == "main"], mesh, memory)
    to_all([i for i in moving if i.mode == "all"], mesh, memory)
    for item in items:
        if item.mode in ("main", "all") and item.full is not None and item.failure is None:
            item.full = each(item.full, keep)
    kept()
    for item in items:  # in the order of the calls, whatever moved first
        try:
            if item.full is not None and item.failure is None:
                item.put(item.full if item.beside is None else item.beside.join(item.full))
        except Exception as error:
            item.failure = error
    return [(item, item.failure) for item in items if item.failure is not None]


def exchange_shapes(mine: Sequence[tuple[int, ...]], mesh: ModelMesh) -> list[Shapes]:
    """Everybody's shapes of several values; only those that differ between ranks are listed. Collective."""
    low, high = extremes(torch.tensor([s for shape in mine for s in shape], dtype=torch.long), mesh.world)
    ends = list(accumulate(map(len, mine)))
    differs = [bool((low != high)[end - len(shape) : end].any()) for end, shape in zip(ends, mine, strict=True)]
    sizes = [s for shape, uneven in zip(mine, differs, strict=True) if uneven for s in shape]
    rows = [iter(row) for row in all_gather_ints(sizes, mesh.world)] if sizes else []
    return [
        Shapes([tuple(islice(row, len(shape))) for row in rows] if uneven else [shape], mesh.size)
        for shape, uneven in zip(mine, differs, strict=True)
    ]


def _as_dtensor(item: Item, mesh: ModelMesh, keep: Callable[[Tensor], Tensor]) -> Tensor | Parts:
    """This rank's shard as a DTensor of the global shape; nothing moves but zig-zag chunks, to contiguous order.

    It is this rank's own part where a DTensor would take the ranks' shards for others.
    """
    local = item.local if item.scale == 1 else item.local / item.scale
    if not mesh.axes:
        return keep(local)
    layout, shape = item.layout, full_shape(item, mesh)
    if layout.parted:
        return Parts((keep(local),), ({mesh.names[i]: mesh.coordinate[i] for i in layout.parted},))
    if item.shapes is not None and not item.shapes.even and not dtensor_holds(layout, mesh, shape, item.shapes):
        sums = [name for name, p in zip(mesh.names, layout.placements, strict=True) if isinstance(p, Partial)]
        if sums:
            raise LayoutError(
                f"{item.where}: deliver='local' would give each rank summands of its rows ({', '.join(sums)}), and "
                f"ranks hold numbers of rows that no DTensor can state; deliver='all' or 'main' gives the whole value."
            )
        return Parts((keep(local),), (dict(zip(mesh.names, mesh.coordinate, strict=True)),))
    local = keep(straighten(local, layout, mesh))
    return DTensor.from_local(
        local,
        mesh.device_mesh(local.device.type),
        straight_layout(layout).placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=tuple(prod(shape[d + 1 :]) for d in range(len(shape))),
    )
