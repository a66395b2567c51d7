"""``Selection``: part of a value, in global coordinates, taken before anything moves wherever that is possible.

What a ``select`` does to each dim is found by giving it coordinates instead of values, so that functions work like
indices: a dim that comes out whole can be selected from on every rank's own shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flex_model.layout.layout import Layout, on_dim, shard_dim

__all__ = ["Selection"]


class Selection:
    """``select`` of a HookFunction: an index, slice, tuple of them, or a function.

    >>> Selection((slice(None), -1)).take(torch.arange(6).view(2, 3)).tolist()
    [2, 5]
    """

    def __init__(self, select: Any) -> None:
        self.take: Callable[[Tensor], Tensor] = select if callable(select) else lambda x: x[select]
        self._index = None if callable(select) else select

    def put(self, value: Tensor, new: Tensor) -> Tensor:
        """``value`` with the selected elements replaced, differentiably; ``value`` itself is not written."""
        out = value.clone()
        if self._index is not None:
            out[self._index] = new
            return out
        part = self.take(out)
        if part._base is out or part is out:  # not a view of a copy, such as of x.flip(0)
            part.copy_(new)
            return out
        where = tuple(self.take(_coordinates(tuple(value.shape), d)) for d in range(value.dim()))
        return value.index_put(where, new)

    def kept_dims(self, shape: tuple[int, ...]) -> dict[int, int]:
        """{dim: dim of the result} of the dims of a value of global shape ``shape`` that come out whole."""
        return {d: e for d in range(len(shape)) if (e := self._kept(shape, d)) is not None}

    def _kept(self, shape: tuple[int, ...], dim: int) -> int | None:
        try:
            out = self.take(_coordinates(shape, dim))
        except (RuntimeError, TypeError, IndexError):
            return None
        if not isinstance(out, Tensor) or out.dtype != torch.long:
            return None
        line = torch.arange(shape[dim])
        for e in range(out.dim()):
            view = [1] * out.dim()
            view[e] = -1
            if out.shape[e] == shape[dim] and bool((out == line.view(view)).all()):
                return e
        return None

    def on_shards(self, layout: Layout, local_shape: tuple[int, ...], sizes: dict[int, int]) -> Layout | None:
        """The layout of the selection, if every rank can take it from its own shard; else None.

        ``sizes`` are the sizes of the axes by index, for the extent that sharded dims have in the full value.
        """
        sharded = {d: i for i in layout.sharded_axes if (d := shard_dim(layout.placements[i])) is not None}
        if not sharded:
            return layout
        # one more than can be there, so that taking "the first n" is not mistaken for taking all
        shape = tuple(
            s * sizes[sharded[d]] + (1 if layout.ragged[sharded[d]] else 0) if d in sharded else s
            for d, s in enumerate(local_shape)
        )
        kept = self.kept_dims(shape)
        if any(d not in kept for d in sharded):
            return None
        placements = list(layout.placements)
        for axis in layout.sharded_axes:
            dim = shard_dim(placements[axis])
            assert dim is not None
            placements[axis] = on_dim(placements[axis], kept[dim])
        return replace(layout, placements=tuple(placements))


def _coordinates(shape: tuple[int, ...], dim: int) -> Tensor:
    """The position of each element on ``dim``; expanded, so it takes no memory."""
    view = [1] * len(shape)
    view[dim] = -1
    return torch.arange(shape[dim]).view(view).expand(shape)
