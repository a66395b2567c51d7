"""What torch's DTensor can hold, and zig-zag parts to contiguous ones and back: it cannot say zig-zag.

Every rank exchanges its two chunks for those that contiguous order gives it; nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Shard

from flex_model.errors import LayoutError
from flex_model.layout.layout import Layout, ZigZag, shard_dim
from flex_model.layout.mesh import ModelMesh

__all__ = ["dtensor_holds", "straight_layout", "straighten", "unstraighten"]


def dtensor_holds(layout: Layout, mesh: ModelMesh, full: Sequence[int], shapes: Sequence[Sequence[int]]) -> bool:
    """Whether a DTensor of the shape ``full`` takes the ranks' parts for what they are: it counts sizes by itself, as
    ``chunk`` does, and puts 1 and 2 rows together as if they were 2 and 1."""
    for rank in range(mesh.size):
        size = list(full)
        for axis, place in enumerate(mesh.coordinate_of(rank)):
            dim, ranks = shard_dim(layout.placements[axis]), mesh.axes[axis].size
            if dim is not None:
                chunk = -(-size[dim] // ranks)
                size[dim] = max(0, min(chunk, size[dim] - place * chunk))
        if tuple(size) != tuple(shapes[rank]):
            return False
    return True


def _holder(chunk: int, size: int) -> int:
    """The rank of ``size`` that holds a chunk in zig-zag."""
    return min(chunk, 2 * size - 1 - chunk)


class _Exchange(torch.autograd.Function):
    """This rank's two chunks on ``dim`` for two others; the backward is the way back."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, dim: int, group: dist.ProcessGroup, to_straight: bool) -> Tensor:
        ctx.way = dim, group, to_straight
        return _exchange(local, dim, group, to_straight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        dim, group, to_straight = ctx.way
        return _exchange(grad, dim, group, not to_straight), None, None, None


def _exchange(local: Tensor, dim: int, group: dist.ProcessGroup, to_straight: bool) -> Tensor:
    size, me = dist.get_world_size(group), dist.get_rank(group)
    zigzag, straight = (me, 2 * size - 1 - me), (2 * me, 2 * me + 1)
    mine, wanted = (zigzag, straight) if to_straight else (straight, zigzag)
    targets = [c // 2 if to_straight else _holder(c, size) for c in mine]
    sources = [_holder(c, size) if to_straight else c // 2 for c in wanted]
    rows = local.movedim(dim, 0)
    length = rows.shape[0] // 2
    if targets[0] > targets[1]:
        rows = rows.roll(length, 0)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    dist.all_to_all_single(
        out,
        rows.contiguous(),
        [length * sources.count(r) for r in range(size)],
        [length * targets.count(r) for r in range(size)],
        group=group,
    )
    if sources[0] > sources[1]:
        out = out.roll(length, 0)
    return out.movedim(0, dim)


def straight_layout(layout: Layout) -> Layout:
    """The layout with contiguous parts in the place of zig-zag ones."""
    placements = tuple(Shard(p.dim) if isinstance(p, ZigZag) else p for p in layout.placements)
    return replace(layout, placements=placements)


def straighten(local: Tensor, layout: Layout, mesh: ModelMesh) -> Tensor:
    """This rank's part of the value in ``straight_layout``, differentiably. Collective over the zig-zag axes."""
    return _all(local, layout, mesh, True)


def unstraighten(local: Tensor, layout: Layout, mesh: ModelMesh) -> Tensor:
    """The inverse."""
    return _all(local, layout, mesh, False)


def _all(local: Tensor, layout: Layout, mesh: ModelMesh, to_straight: bool) -> Tensor:
    for axis, placement in enumerate(layout.placements):
        if isinstance(placement, ZigZag):
            if sum(p.dim == placement.dim for p in layout.placements if isinstance(p, (Shard, ZigZag))) > 1:
                raise LayoutError(
                    f"dim {placement.dim} is in zig-zag over {mesh.names[axis]!r} and sharded again, which a DTensor "
                    f"cannot hold (rank {mesh.rank}); leave run='every_rank' and deliver='main' or 'all'.",
                    page="zig-zag-sharded-again",
                )
            local = _Exchange.apply(local, placement.dim, mesh.group(axis), to_straight)
    return local
