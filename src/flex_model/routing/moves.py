"""Moves: how the bytes of shards get to one rank, or to all. Several small values travel in one message, large ones in
pieces, which are put in their place in the full tensor while the next ones come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flex_model.layout.layout import Layout
from flex_model.layout.mesh import ModelMesh
from flex_model.routing.assembly import Parts, assemble, merge, owners, owns, place_of
from flex_model.routing.collectives import all_gather_flat, from_bytes, to_bytes
from flex_model.routing.item import Item, full_shape
from flex_model.routing.memory import Memory

__all__ = ["to_all", "to_main"]

_BUCKET = 16 * 2**20  # bytes of values that travel together
_LARGE = 2**20  # bytes of a part from which on it is worth a message of its own
_PIECE = 4 * 2**20  # bytes of a large part that travel together: they are put in their place while the next ones come
_AHEAD = 16 * 2**20  # bytes that may be on their way from one rank


def to_main(items: Sequence[Item], mesh: ModelMesh, memory: Memory) -> None:
    """Each shard to the main rank, once."""
    large = [_goes_in_pieces(i) for i in items]
    _pieces_to_main([i for i, pieces in zip(items, large, strict=True) if pieces], mesh, memory)
    for bucket in _buckets([i for i, pieces in zip(items, large, strict=True) if not pieces]):
        _to_main(bucket, mesh, memory)


def to_all(items: Sequence[Item], mesh: ModelMesh, memory: Memory) -> None:
    """Every shard to every rank that lacks it."""
    for axes in dict.fromkeys(_lines(i, mesh) for i in items):
        for bucket in _buckets([i for i in items if _lines(i, mesh) == axes]):
            _to_all(bucket, mesh, memory) if axes is None else _along_lines(bucket, axes, mesh, memory)


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
        if room is None and item.shapes is not None and item.shapes.even and item.layout.has_places:
            room = memory.empty(full_shape(item, mesh), item.local.dtype, item.local.device)
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


def _goes_in_pieces(item: Item) -> bool:
    assert item.shapes is not None
    even = item.shapes.even and item.local.device.type == "cpu"
    return even and item.local.nbytes >= _LARGE and item.layout.has_places


def _pieces(local: Tensor) -> list[Tensor]:
    """A tensor in views that follow one another in memory, if it is contiguous."""
    dim = next((d for d, size in enumerate(local.shape) if size > 1), 0)
    rows = max(1, _PIECE * local.shape[dim] // local.nbytes)
    return list(local.split(rows, dim))


def _pieces_to_main(items: Sequence[Item], mesh: ModelMesh, memory: Memory) -> None:
    if not mesh.is_main:
        given = [p for i in items if owns(mesh, i.layout) for p in _pieces(i.local.contiguous())]
        home = mesh.group_rank(mesh.home)
        _wait([dist.isend(to_bytes(p), group=mesh.world, group_dst=home) for p in given])
        return
    coming: deque[tuple[Any, Tensor, Tensor]] = deque()
    rooms = list(zip(items, _rooms(items, mesh, memory), strict=True))

    def put() -> None:
        work, part, place = coming.popleft()
        _wait([work])
        _put(part, place)

    for item, room in rooms:
        assert room is not None
        places = {rank: _pieces(place_of(room, item.layout, mesh, rank)) for rank in owners(mesh, item.layout)}
        mine = places.pop(mesh.me)
        for at in zip(*places.values(), strict=True):
            for rank, place in zip(places, at, strict=True):
                part = place if place.is_contiguous() else memory.empty(place.shape, place.dtype)
                coming.append((dist.irecv(to_bytes(part), group=mesh.world, group_src=rank), part, place))
            while sum(part.nbytes for _, part, _ in coming) > _AHEAD * len(places):
                put()
        for part, place in zip(_pieces(item.local), mine, strict=True):
            _put(part, place)
    while coming:
        put()
    for item, room in rooms:
        assert room is not None
        item.complete(room)


def _wait(works: Sequence[Any]) -> None:
    for work in works:
        if work is not None:
            work.wait()


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
    _wait(works)
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
