"""``Selection``: part of a value, in global coordinates, taken before anything moves wherever that is possible.

What a ``select`` does to each dim is found by giving it coordinates instead of values, so that functions work like
indices: a dim that comes out whole can be selected from on every rank's own shard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flex_model.layout.layout import Layout, on_dim, shard_dim
from flex_model.layout.mesh import ModelMesh

__all__ = ["Selection", "Taken"]


class Taken(NamedTuple):
    """The selection of a rank's own shard, how these lie on the ranks, and what is left to do once they are whole."""

    local: Tensor
    layout: Layout
    finish: Callable[[Tensor], Tensor] | None = None


class Selection:
    """``select`` of a HookFunction: an index, slice, tuple of them, or a function.

    >>> Selection((slice(None), -1)).take(torch.arange(6).view(2, 3)).tolist()
    [2, 5]
    """

    of_gradients = False  # whether it also applies to the gradient of what a forward hook captures

    def __init__(self, select: Any) -> None:
        self.take: Callable[[Tensor], Tensor] = select if callable(select) else lambda x: x[select]
        self._index = None if callable(select) else select
        self._known: dict[Any, dict[int, int] | None] = {}
        self.failure = "from the whole"  # and why, where the function could not be asked for places

    @classmethod
    def of(cls, select: Any) -> Selection:
        """``select`` of a HookFunction, which may be a Selection already."""
        return select if isinstance(select, Selection) else cls(select)

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

    def of_shard(self, local: Tensor, layout: Layout, mesh: ModelMesh) -> Taken | None:
        """The selection of this rank's shard; None, on all ranks, if it can only be made from the whole."""
        new = self.on_shards(layout, tuple(local.shape), {i: a.size for i, a in enumerate(mesh.axes)})
        return None if new is None else Taken(self.take(local), new)

    def on_shards(self, layout: Layout, local_shape: tuple[int, ...], sizes: dict[int, int]) -> Layout | None:
        """The layout of the selection, if every rank can take it from its own shard; else None.

        ``sizes`` are the sizes of the axes by index. All ranks come to the same answer, whatever the sizes of their
        own shards: where these may differ, a sharded dim counts as one that nobody knows the size of.
        """
        shards: dict[int, int] = {}  # of each sharded dim: how many there are
        shape: list[int | None] = list(local_shape)
        for axis in layout.sharded_axes:
            dim = shard_dim(layout.placements[axis])
            assert dim is not None
            shards[dim] = shards.get(dim, 1) * sizes[axis]
            if layout.ragged[axis]:
                shape[dim] = None
        if not shards:
            return layout
        key = tuple(shape), tuple(shards.items())
        if key not in self._known:
            self._known[key] = self._kept_dims(shape, shards)
        kept = self._known[key]
        if kept is None:
            return None
        placements = list(layout.placements)
        for axis in layout.sharded_axes:
            dim = shard_dim(placements[axis])
            assert dim is not None
            placements[axis] = on_dim(placements[axis], kept[dim])
        return replace(layout, placements=tuple(placements))

    def _kept_dims(self, shape: Sequence[int | None], shards: Mapping[int, int]) -> dict[int, int] | None:
        """{sharded dim: dim of the result}, if all of them come out whole."""
        found = {}
        for dim, count in shards.items():
            known = shape[dim]
            wholly = _wholly(self._index, len(shape), dim)
            if wholly is False:
                return None
            extents = [_FEW]
            if wholly is None:
                extents = [self._many(shape, dim), _FEW] if known is None else [known * count, known]
            place: int | None = None
            for extent in extents:
                place = self._place(tuple(_FEW if s is None else s for s in shape), dim, extent, place)
                if place is None:
                    return None
                found[dim] = place
        return found

    def _place(self, shape: tuple[int, ...], dim: int, extent: int, expected: int | None = None) -> int | None:
        """Where dim ``dim`` of this extent comes out whole, or None if it does not; ``expected`` is where to look."""
        shape = (*shape[:dim], extent, *shape[dim + 1 :])
        try:
            out = self.take(_coordinates(shape, dim))
        except (RuntimeError, TypeError, IndexError, ValueError) as error:
            self.failure = f"from the whole, because of places it makes {type(error).__name__}: {error}"
            return None
        if not isinstance(out, Tensor) or out.dtype != torch.long:
            return None
        line = torch.arange(extent)
        for e in range(out.dim()) if expected is None else [expected]:
            view = [1] * out.dim()
            view[e] = -1
            if out.shape[e] == extent and bool((out == line.view(view)).all()):
                return e
        return None

    def _many(self, shape: Sequence[int | None], dim: int) -> int:
        """More than can be there, so that taking "the first n" is not mistaken for taking all; as memory allows."""
        sizes = tuple(_MANY if d == dim else _FEW if s is None else s for d, s in enumerate(shape))
        try:
            out = self.take(torch.empty(sizes, dtype=torch.long, device="meta"))
            fits = isinstance(out, Tensor) and out.numel() <= 2**22
        except Exception:  # the function needs values
            fits = False
        return _MANY if fits else _MANY // 64


_FEW, _MANY = 3, 2**16 + 1


def _wholly(index: Any, dims: int, dim: int) -> bool | None:
    """Whether an index takes all of a dim, whatever its size; None where that is not written in it."""
    if index is None:
        return None
    entries = list(index) if isinstance(index, tuple) else [index]
    if any(not _takes_places(e) for e in entries):
        return None
    consumed = sum(e is not None and e is not Ellipsis for e in entries)
    rest = [slice(None)] * (dims - consumed)
    at = next((i for i, e in enumerate(entries) if e is Ellipsis), len(entries))
    spelled = [e for e in (*entries[:at], *rest, *entries[at + 1 :]) if e is not None]
    entry = spelled[dim] if dim < len(spelled) else None
    return isinstance(entry, slice) and entry.start in (None, 0) and entry.stop is None and entry.step in (None, 1)


def _takes_places(entry: Any) -> bool:
    """Whether an entry of an index names places of one dim, or none: not a mask."""
    if isinstance(entry, Tensor):
        return entry.dtype not in (torch.bool, torch.uint8)
    if isinstance(entry, list):
        return all(isinstance(e, int) and not isinstance(e, bool) for e in entry)
    return entry is None or entry is Ellipsis or (isinstance(entry, (int, slice)) and not isinstance(entry, bool))


def _coordinates(shape: tuple[int, ...], dim: int) -> Tensor:
    """The position of each element on ``dim``; expanded, so it takes no memory."""
    view = [1] * len(shape)
    view[dim] = -1
    return torch.arange(shape[dim]).view(view).expand(shape)
