"""Delivery: staged local tensors to full tensors where the user wants them.

Everything staged up to a point that all ranks pass moves together: sizes first where they may differ, then the bytes
of distinct shards only, several small values in one message. Replicated values move nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from flex_model.errors import ShapeError
from flex_model.layout.layout import Layout, shard_dim
from flex_model.layout.mesh import ModelMesh
from flex_model.routing.assembly import Parts, assemble, owners
from flex_model.routing.collectives import all_gather_flat, all_gather_ints, from_bytes, to_bytes

__all__ = ["Buffers", "Deliver", "Item", "deliver", "to_host"]

Deliver = Literal["main", "all", "local"]
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
    scale: float = 1.0  # the full value is divided by this: gradients that an engine means over data axes
    finish: Callable[[Tensor], Tensor] | None = None  # what is left of a selection once the value is whole
    check: Callable[[tuple[int, ...]], str] | None = None  # what is wrong with the full shape
    label: Any = None  # what it is, for whoever passes it on
    beside: Beside | None = None  # what identifies its rows, and travels with it
    shapes: list[tuple[int, ...]] | None = None
    full: Tensor | Parts | None = None  # here, once it has arrived

    def complete(self, full: Tensor | Parts) -> None:
        if isinstance(full, Parts):
            self.full = replace(full, tensors=tuple(self._completed(t) for t in full.tensors))
        else:
            self.full = self._completed(full)

    def _completed(self, full: Tensor) -> Tensor:
        full = full / self.scale if self.scale != 1 else full
        return self.finish(full) if self.finish is not None else full


class Buffers:
    """Receive buffers that are used again; what is built from them is copied out before the next message."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, torch.device], Tensor] = {}

    def take(self, key: int, size: int, device: torch.device) -> Tensor:
        kept = self._kept.get((key, device))
        if kept is None or kept.numel() < size:
            kept = torch.empty(size, dtype=torch.uint8, device=device)
            if size <= _BUCKET:
                self._kept[key, device] = kept
        return kept[:size]


def to_host(tensor: Tensor, device: torch.device | None) -> Tensor:
    """A copy of ``tensor`` on ``device``; from a GPU to the CPU it is asynchronous, into pinned memory."""
    if tensor.is_inference():  # a copy made outside of inference mode is an ordinary tensor
        with torch.inference_mode(False):
            return tensor.to(device, copy=True) if device is not None else tensor.clone()
    if device is None or tensor.device == device or tensor.device.type == device.type != "cuda":
        return tensor.detach().clone()
    if tensor.is_cuda and device.type == "cpu":
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor.detach(), non_blocking=True)
    return tensor.detach().to(device, copy=True)


def deliver(items: Sequence[Item], mesh: ModelMesh, buffers: Buffers) -> None:
    """Bring every item where it is wanted. Collective: all ranks of the mesh pass the same items in the same order.

    Raises ShapeError, on every rank and before anything is delivered, where a full shape is not the expected one.
    """
    items = [*(i.beside.item for i in items if i.beside is not None), *items]
    moving = [i for i in items if i.layout.moving_axes]
    _exchange_shapes([i for i in moving if any(i.layout.ragged)], mesh)
    for item in moving:
        if item.shapes is None:
            item.shapes = [tuple(item.local.shape)] * mesh.size
    for item in items:
        problem = "" if item.check is None else item.check(_full_shape(item, mesh))
        if problem:
            raise ShapeError(problem)
    for item in items:
        if item.mode == "local":
            item.full = _as_dtensor(item, mesh)
        elif not item.layout.moving_axes and (item.mode == "all" or mesh.is_main):
            item.complete(item.local)
    for mode in ("main", "all"):
        for bucket in _buckets([i for i in moving if i.mode == mode]):
            _move(bucket, mesh, mode, buffers)
    for item in items:  # in the order of the calls, whatever moved first
        if item.full is not None:
            item.put(item.full if item.beside is None else item.beside.join(item.full))


def _exchange_shapes(items: Sequence[Item], mesh: ModelMesh) -> None:
    if not items:
        return
    mine = [s for i in items for s in i.local.shape]
    rows = all_gather_ints(mine, mesh.world, items[0].local.device)
    start = 0
    for item in items:
        dims = item.local.dim()
        item.shapes = [tuple(row[start : start + dims]) for row in rows]
        start += dims


def _buckets(items: Sequence[Item]) -> list[list[Item]]:
    out: list[list[Item]] = []
    size = _BUCKET + 1  # the first value opens the first bucket, be it empty
    for item in items:
        assert item.shapes is not None
        width = max(prod(s) for s in item.shapes) * item.local.dtype.itemsize
        if size + width > _BUCKET or out[-1][0].local.device != item.local.device:
            out.append([])
            size = 0
        out[-1].append(item)
        size += width
    return out


def _bytes_of(item: Item, rank: int) -> int:
    assert item.shapes is not None
    return prod(item.shapes[rank]) * item.local.dtype.itemsize


def _move(bucket: Sequence[Item], mesh: ModelMesh, mode: str, buffers: Buffers) -> None:
    """Every owner's bytes of the bucket to main, or to all, and there into full tensors."""
    holders = [owners(mesh, item.layout) for item in bucket]
    sizes = [sum(_bytes_of(i, r) for i, own in zip(bucket, holders, strict=True) if r in own) for r in range(mesh.size)]
    me, main = mesh.ranks.index(mesh.rank), mesh.ranks.index(mesh.main)
    mine = [to_bytes(i.local) for i, own in zip(bucket, holders, strict=True) if me in own]
    payload = torch.cat(mine) if len(mine) > 1 else (mine[0] if mine else None)
    if mode == "main":
        received = _to_main(payload, sizes, me, main, mesh, buffers)
    else:
        received = _to_all(payload, sizes, mesh, bucket[0].local.device, buffers)
    if received is None:
        return
    offsets = [0] * mesh.size
    for item, own in zip(bucket, holders, strict=True):
        parts = {}
        for rank in own:
            assert item.shapes is not None
            width = _bytes_of(item, rank)
            chunk = received[rank][offsets[rank] : offsets[rank] + width]
            parts[rank] = from_bytes(chunk, item.shapes[rank], item.local.dtype)
            offsets[rank] += width
        item.complete(assemble(parts, item.layout, mesh))


def _to_main(
    payload: Tensor | None, sizes: Sequence[int], me: int, main: int, mesh: ModelMesh, buffers: Buffers
) -> dict[int, Tensor] | None:
    if me != main:
        if payload is not None and sizes[me]:
            dist.send(payload, group=mesh.world, group_dst=main)
        return None
    assert payload is not None
    received, works = {me: payload}, []
    for rank, size in enumerate(sizes):
        if rank != me:
            received[rank] = buffers.take(rank, size, payload.device)
            if size:
                works.append(dist.irecv(received[rank], group=mesh.world, group_src=rank))
    for work in works:
        if work is not None:
            work.wait()
    return received


def _to_all(
    payload: Tensor | None, sizes: Sequence[int], mesh: ModelMesh, device: torch.device, buffers: Buffers
) -> dict[int, Tensor]:
    width = max(sizes)
    mine = torch.zeros(width, dtype=torch.uint8, device=device)
    if payload is not None:
        mine[: payload.numel()] = payload
    out = buffers.take(-1, width * mesh.size, device)
    if width:
        all_gather_flat(out, mine, group=mesh.world)
    return {rank: out[rank * width : rank * width + size] for rank, size in enumerate(sizes)}


def _as_dtensor(item: Item, mesh: ModelMesh) -> Tensor | Parts:
    """This rank's shard as a DTensor of the global shape, or its own part; nothing moves."""
    if not mesh.axes:
        return item.local
    if item.layout.parted:
        return Parts((item.local,), ({mesh.names[i]: mesh.coordinate[i] for i in item.layout.parted},))
    shape = _full_shape(item, mesh)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        item.local,
        mesh.device_mesh(item.local.device.type),
        item.layout.placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=stride,
    )


def _full_shape(item: Item, mesh: ModelMesh) -> tuple[int, ...]:
    shape = list(item.local.shape)
    if item.shapes is not None:
        for axis, placement in enumerate(item.layout.placements):
            dim = shard_dim(placement)
            if dim is not None:
                line = [r for r, c in enumerate(mesh.coordinates()) if _same_line(c, mesh.coordinate, axis)]
                own = item.shapes[mesh.ranks.index(mesh.rank)][dim]
                total = sum(item.shapes[r][dim] for r in line)
                shape[dim] = shape[dim] * total // own if own else total  # a rank may hold no rows
    return tuple(shape)


def _same_line(a: Sequence[int], b: Sequence[int], axis: int) -> bool:
    return all(x == y for i, (x, y) in enumerate(zip(a, b, strict=True)) if i != axis)
