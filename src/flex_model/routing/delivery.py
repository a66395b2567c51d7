"""Delivery: staged local tensors to full tensors where the user wants them.

Everything staged up to a point that all ranks pass moves together: sizes first where they may differ, then the bytes
of distinct shards only, several small values in one message. Replicated values move nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from math import prod
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from flex_model.errors import LayoutError, ShapeError
from flex_model.layout.layout import Layout, shard_dim
from flex_model.layout.mesh import ModelMesh
from flex_model.routing.assembly import (
    Parts,
    Shapes,
    assemble,
    has_places,
    merge,
    owners,
    owns,
    place_of,
    size_below,
)
from flex_model.routing.collectives import all_gather_flat, all_gather_ints, extremes, from_bytes, to_bytes
from flex_model.routing.memory import Memory
from flex_model.routing.straight import dtensor_holds, straight_layout, straighten

__all__ = ["Deliver", "Item", "deliver", "exchange_shapes"]

Deliver = Literal["main", "all", "local", "shards"]  # shards: to a sink of shards, which takes them as they are
_BUCKET = 16 * 2**20  # bytes; values up to this size travel together


class Beside(Protocol):
    """What identifies a value's rows, on its way beside the value."""

    item: Item

    def join(self, value: Tensor | Parts) -> Any:
        """The value with what it is."""


@dataclass(slots=True)
class Item:
    """One value on its way. ``put`` receives the full tensor (or Parts) on the ranks it is delivered to."""

    where: str
    local: Tensor
    layout: Layout
    mode: Deliver
    put: Callable[[Any], None]
    room: Tensor | None = None  # the full tensor, of which ``local`` is this rank's place
    scale: float = 1.0  # the full value is divided by this: gradients that an engine means over data axes
    finish: Callable[[Tensor], Tensor] | None = None  # what is left of a selection once the value is whole
    check: Callable[[tuple[int, ...]], str] | None = None  # what is wrong with the full shape
    label: Any = None  # what it is, for whoever passes it on
    beside: Beside | None = None  # what identifies its rows, and travels with it
    shapes: Shapes | None = None
    full: Tensor | Parts | None = None  # here, once it has arrived
    failure: Exception | None = None  # why it could not be finished or put away on this rank

    def complete(self, full: Tensor | Parts) -> None:
        """Runs between collectives, so that a failure must wait."""
        try:
            self.full = _each(full, self._completed)
        except Exception as error:
            self.failure = error

    def _completed(self, full: Tensor) -> Tensor:
        full = full / self.scale if self.scale != 1 else full
        return self.finish(full) if self.finish is not None else full


def _each(full: Tensor | Parts, fn: Callable[[Tensor], Tensor]) -> Tensor | Parts:
    return replace(full, tensors=tuple(map(fn, full.tensors))) if isinstance(full, Parts) else fn(full)


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
        problem = "" if item.check is None else item.check(_full_shape(item, mesh))
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
    for bucket in _buckets([i for i in moving if i.mode == "main"]):
        _to_main(bucket, mesh, memory)
    for axes in dict.fromkeys(_lines(i, mesh) for i in moving if i.mode == "all"):
        for bucket in _buckets([i for i in moving if i.mode == "all" and _lines(i, mesh) == axes]):
            _to_all(bucket, mesh, memory) if axes is None else _along_lines(bucket, axes, mesh, memory)
    for item in items:
        if item.mode in ("main", "all") and item.full is not None and item.failure is None:
            item.full = _each(item.full, keep)
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


def _buckets(items: Sequence[Item]) -> list[list[Item]]:
    out: list[list[Item]] = []
    size = _BUCKET + 1  # the first value opens the first bucket, be it empty
    for item in items:
        assert item.shapes is not None
        width = item.shapes.largest * item.local.dtype.itemsize
        if size + width > _BUCKET or out[-1][0].local.device != item.local.device:
            out.append([])
            size = 0
        out[-1].append(item)
        size += width
    return out


def _bytes_of(item: Item, rank: int) -> int:
    assert item.shapes is not None
    return int(prod(item.shapes[rank])) * item.local.dtype.itemsize


def _payload(bucket: Sequence[Item], mesh: ModelMesh) -> Tensor | None:
    """What this rank has to give of a bucket."""
    mine = [to_bytes(i.local) for i in bucket if owns(mesh, i.layout)]
    return torch.cat(mine) if len(mine) > 1 else (mine[0] if mine else None)


def _sizes(bucket: Sequence[Item], mesh: ModelMesh) -> dict[int, int]:
    """Bytes of the bucket by the rank that has them to give."""
    sizes: dict[int, int] = {}
    for item in bucket:
        for rank in owners(mesh, item.layout):
            sizes[rank] = sizes.get(rank, 0) + _bytes_of(item, rank)
    return sizes


def _rooms(bucket: Sequence[Item], mesh: ModelMesh, memory: Memory) -> list[Tensor | None]:
    """Of each item the full tensor, for its parts to be put in their places; None where parts have no places."""
    rooms: list[Tensor | None] = []
    for item in bucket:
        room = item.room
        if room is None and item.shapes is not None and item.shapes.even and has_places(item.layout):
            room = memory.empty(_full_shape(item, mesh), item.local.dtype, item.local.device)
        rooms.append(room)
    return rooms


def _complete(
    bucket: Sequence[Item], rooms: Sequence[Tensor | None], received: dict[int, Tensor], mesh: ModelMesh
) -> None:
    """Other ranks' bytes and this rank's own tensors into full tensors."""
    offsets = dict.fromkeys(received, 0)
    for item, room in zip(bucket, rooms, strict=True):
        parts = {}
        for rank in owners(mesh, item.layout):
            assert item.shapes is not None
            if rank == mesh.me:
                parts[rank] = item.local
                continue
            width = _bytes_of(item, rank)
            chunk = received[rank][offsets[rank] : offsets[rank] + width]
            parts[rank] = from_bytes(chunk, item.shapes[rank], item.local.dtype)
            offsets[rank] += width
        if room is not None:
            for rank, part in parts.items():
                _put(part, place_of(room, item.layout, mesh, rank))
            item.complete(room)
            continue
        whole = assemble(parts, item.layout, mesh)
        if isinstance(whole, Parts):  # as they lie in what was received, one behind the other
            whole = replace(whole, tensors=tuple(t.clone() for t in whole.tensors))
        item.complete(whole)


def _put(part: Tensor, place: Tensor) -> None:
    if part.data_ptr() != place.data_ptr():  # it is there already
        place.copy_(part)


def _straight(rooms: Sequence[Tensor | None], layout: Layout, mesh: ModelMesh, rank: int) -> Tensor | None:
    """Where in a bucket's only full tensor the bytes of a rank lie one behind the other, so that they can go there."""
    if len(rooms) > 1 or rooms[0] is None:
        return None
    place = place_of(rooms[0], layout, mesh, rank)
    return to_bytes(place) if place.is_contiguous() else None


def _to_main(bucket: Sequence[Item], mesh: ModelMesh, memory: Memory) -> None:
    device = bucket[0].local.device
    if not mesh.is_main:
        payload = _payload(bucket, mesh)
        if payload is not None and payload.numel():
            dist.send(payload, group=mesh.world, group_dst=mesh.group_rank(mesh.home))
        return
    rooms = _rooms(bucket, mesh, memory)
    received, works = {}, []
    for rank, size in _sizes(bucket, mesh).items():
        if rank != mesh.me:
            there = _straight(rooms, bucket[0].layout, mesh, rank)
            received[rank] = memory.empty((size,), torch.uint8, device) if there is None else there
            if size:
                works.append(dist.irecv(received[rank], group=mesh.world, group_src=rank))
    for work in works:
        if work is not None:
            work.wait()
    _complete(bucket, rooms, received, mesh)


def _to_all(bucket: Sequence[Item], mesh: ModelMesh, memory: Memory) -> None:
    """In one message between all ranks."""
    sizes, mine, device = _sizes(bucket, mesh), _payload(bucket, mesh), bucket[0].local.device
    width = max(sizes.values())
    if mine is None or mine.numel() < width:
        padded = memory.empty((width,), torch.uint8, device)
        if mine is not None:
            padded[: mine.numel()] = mine
        mine = padded
    out = memory.empty((width * mesh.size,), torch.uint8, device)
    if width:
        all_gather_flat(out, mine, group=mesh.world)
    received = {rank: out[rank * width : rank * width + size] for rank, size in sizes.items()}
    _complete(bucket, _rooms(bucket, mesh, memory), received, mesh)


def _lines(item: Item, mesh: ModelMesh) -> tuple[int, ...] | None:
    """The axes along whose lines a value can be gathered, so that ranks with replicas send nothing to one another.

    None: it takes all ranks anyway, or its parts differ in size.
    """
    assert item.shapes is not None
    axes = item.layout.moving_axes
    return axes if item.shapes.even and not item.layout.parted and len(axes) < len(mesh.axes) else None


def _along_lines(bucket: Sequence[Item], axes: Sequence[int], mesh: ModelMesh, memory: Memory) -> None:
    """Axis by axis, the innermost first, along this rank's own lines."""
    values = [item.local for item in bucket]
    rooms = _rooms(bucket, mesh, memory) if len(axes) == 1 else [None] * len(bucket)
    for axis in reversed(axes):
        mine = [to_bytes(v) for v in values]
        payload = torch.cat(mine) if len(mine) > 1 else mine[0]
        line, width = mesh.line(axis), payload.numel()
        there = None if _straight(rooms, bucket[0].layout, mesh, line[0]) is None else rooms[0]
        rows = memory.empty((len(line) * width,), torch.uint8, payload.device) if there is None else to_bytes(there)
        if width:
            all_gather_flat(rows, payload, group=mesh.group(axis))
        start = 0
        for i, (item, value, room) in enumerate(zip(bucket, values, rooms, strict=True)):
            end = start + value.numel() * value.dtype.itemsize
            parts = [from_bytes(row[start:end], value.shape, value.dtype) for row in rows.view(len(line), width)]
            if room is None:
                values[i] = merge(parts, item.layout.placements[axis])
            else:
                for rank, part in zip(line, parts, strict=True):
                    _put(part, place_of(room, item.layout, mesh, rank))
                values[i] = room
            start = end
    for item, value in zip(bucket, values, strict=True):
        item.complete(value)


def _as_dtensor(item: Item, mesh: ModelMesh, keep: Callable[[Tensor], Tensor]) -> Tensor | Parts:
    """This rank's shard as a DTensor of the global shape; nothing moves but zig-zag chunks, to contiguous order.

    It is this rank's own part where a DTensor would take the ranks' shards for others.
    """
    local = item.local if item.scale == 1 else item.local / item.scale
    if not mesh.axes:
        return keep(local)
    layout, shape = item.layout, _full_shape(item, mesh)
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


def _full_shape(item: Item, mesh: ModelMesh) -> tuple[int, ...]:
    shape = list(item.local.shape)
    for axis, placement in enumerate(item.layout.placements) if item.shapes is not None else ():
        dim = shard_dim(placement)
        if dim is not None and item.shapes is not None:
            shape[dim] = (
                shape[dim] * mesh.axes[axis].size
                if item.shapes.even
                else size_below(item.layout, mesh, item.shapes, (), dim)
            )
    return tuple(shape)
