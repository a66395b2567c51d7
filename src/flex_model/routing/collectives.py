"""Bytes from rank to rank: the few collectives the library uses, for tensors of any dtype and of unequal sizes.

Values travel from device to device as bytes, so bool, fp8 and complex need nothing special. The small numbers by
which ranks agree stay in host memory, where no device has to be waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flex_model.routing.watch import wait

all_gather_flat = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name from torch 2.13 on

__all__ = [
    "all_gather_flat",
    "all_gather_ints",
    "all_gather_objects",
    "all_gather_parts",
    "extremes",
    "from_bytes",
    "to_bytes",
]


def to_bytes(tensor: Tensor) -> Tensor:
    """The tensor's elements as a flat uint8 tensor; no copy where it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.numel() == 1:  # contiguous whatever its stride, which may be that of a larger tensor
        flat = flat.as_strided((1,), (1,))
    return flat.view(torch.uint8)


def from_bytes(data: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    count = prod(shape) * dtype.itemsize
    data = data[:count]
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).reshape(tuple(shape))


def all_gather_parts(local: Tensor, shapes: Sequence[Sequence[int]], group: dist.ProcessGroup) -> list[Tensor]:
    """Every rank's tensor, in group order. ``shapes`` are all ranks' shapes; the dtype is the same on all."""
    sizes = [prod(s) * local.dtype.itemsize for s in shapes]
    width = max(sizes)
    mine = to_bytes(local)
    if mine.numel() < width:
        mine = torch.cat([mine, mine.new_zeros(width - mine.numel())])
    out = torch.empty(len(shapes) * width, dtype=torch.uint8, device=local.device)
    if width:
        all_gather_flat(out, mine, group=group)
    rows = out.view(len(shapes), width) if width else out.view(len(shapes), 0)
    return [from_bytes(rows[i], s, local.dtype) for i, s in enumerate(shapes)]


def all_gather_ints(values: Sequence[int], group: dist.ProcessGroup) -> list[list[int]]:
    """Every rank's integers, in group order; the count is the same on all ranks."""
    mine = torch.tensor(list(values), dtype=torch.long, device="cpu")
    out = mine.new_empty(dist.get_world_size(group) * len(values))
    all_gather_flat(out, mine, group=group)
    rows: list[list[int]] = out.view(-1, len(values)).tolist()
    return rows


def all_gather_objects(value: Any, group: dist.ProcessGroup) -> list[Any]:
    out: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(out, value, group=group)
    return out


def extremes(values: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The lowest and the highest of each value over all ranks: how ranks compare at a cost that does not grow with
    their number."""
    values = values.cpu()
    both = torch.cat([values, -values])
    wait(dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group, async_op=True))
    high, low = both.chunk(2)
    return -low, high
