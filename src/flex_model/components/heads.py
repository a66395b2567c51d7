"""Attention heads as a selection: the value is seen with a dim of heads, taken from the shards that hold them.

Under tensor parallelism projections are sharded by whole heads, so that each rank takes those of the wanted heads that
it has, be it none; only they move.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.tensor import Shard

from flex_model.errors import ShapeError
from flex_model.layout.layout import Layout, shard_dim
from flex_model.layout.mesh import ModelMesh
from flex_model.routing.selection import Selection, Taken

__all__ = ["FlatHeads", "Heads"]

Chosen = int | tuple[int, ...] | None


class Heads(Selection):
    """Heads of a value that has a dim of them: attention probabilities ``(B, heads, S, S)``.

    >>> Heads(2, chosen=1).take(torch.arange(2).view(1, 2, 1, 1)).tolist()
    [[[1]]]
    """

    of_gradients = True
    dim = -3  # of heads, in the value as it is seen

    def __init__(self, count: int, *, chosen: Chosen = None) -> None:
        super().__init__(lambda x: self._chosen_of(self.seen(self._checked(x))))
        self.count, self.chosen = count, chosen

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.count}, {self.chosen})"

    @property
    def wanted(self) -> Sequence[int]:
        chosen = range(self.count) if self.chosen is None else self.chosen
        return (chosen,) if isinstance(chosen, int) else chosen

    @property
    def whole(self) -> bool:
        """Whether it is all of the value, only seen otherwise."""
        return self.chosen is None

    def seen(self, value: Tensor) -> Tensor:
        """The value, or a shard of it that holds whole heads, as a view with the heads on ``dim``."""
        return value

    def put(self, value: Tensor, new: Tensor) -> Tensor:
        out = value.clone()
        seen = self.seen(out)
        if isinstance(self.chosen, int):
            new = new.unsqueeze(self.dim)
        for i, head in enumerate(self.wanted):
            seen.select(self.dim, head).copy_(new.select(self.dim, i))
        return out

    def of_shard(self, local: Tensor, layout: Layout, mesh: ModelMesh) -> Taken | None:
        at = local.dim() + self.local_dim
        axes = [i for i in layout.sharded_axes if shard_dim(layout.placements[i]) == at]
        if not axes:
            return self._of_whole_heads(local, layout)
        if not self._cut_by_heads(local, layout, axes):
            self.failure = "from the whole, because ranks do not hold whole heads"
            return None
        seen = self.seen(local)
        if self.chosen is None:
            return Taken(seen, layout)
        place = 0
        for i in axes:
            place = place * mesh.axes[i].size + mesh.coordinate[i]
        here, kept = seen.shape[self.dim], sorted(set(self.wanted))
        mine = [h - place * here for h in kept if 0 <= h - place * here < here]
        part = seen.index_select(self.dim, torch.tensor(mine, dtype=torch.long, device=seen.device))
        ragged = tuple(r or i in axes for i, r in enumerate(layout.ragged))
        return Taken(part, replace(layout, ragged=ragged), self._finish(kept))

    @property
    def local_dim(self) -> int:
        """Of heads, in the value as it is."""
        return self.dim

    def _of_whole_heads(self, local: Tensor, layout: Layout) -> Taken | None:
        """Nobody has only some of the heads: a head that is taken alone moves the dims behind it."""
        moved = isinstance(self.chosen, int) and any(
            (shard_dim(layout.placements[i]) or 0) > local.dim() + self.local_dim for i in layout.sharded_axes
        )
        return None if moved else Taken(self.take(local), layout)

    def _cut_by_heads(self, local: Tensor, layout: Layout, axes: Sequence[int]) -> bool:
        return all(
            layout.placements[i] == Shard(shard_dim(layout.placements[i]) or 0) and not layout.ragged[i] for i in axes
        )

    def _finish(self, kept: list[int]) -> Callable[[Tensor], Tensor]:
        places = [kept.index(h) for h in self.wanted]

        def finish(whole: Tensor) -> Tensor:
            if isinstance(self.chosen, int):
                return whole.select(self.dim, 0)
            if places == list(range(len(kept))):
                return whole
            return whole.index_select(self.dim, torch.tensor(places, device=whole.device))

        return finish

    def _chosen_of(self, seen: Tensor) -> Tensor:
        if self.chosen is None:
            return seen
        if isinstance(self.chosen, int):
            return seen.select(self.dim, self.chosen)
        return seen.index_select(self.dim, torch.tensor(self.chosen, device=seen.device))

    def _checked(self, value: Tensor) -> Tensor:
        if value.dim() < 4 or value.shape[self.dim] != self.count:
            raise ShapeError(f"expected (B, {self.count} heads, S, S), the value is {tuple(value.shape)}.")
        return value


class FlatHeads(Heads):
    """Heads side by side on the last dim: ``(B, S, width)`` is seen as ``(B, S, heads, size)``.

    >>> FlatHeads(2, 3, chosen=1).take(torch.arange(6).view(1, 1, 6)).tolist()
    [[[3, 4, 5]]]

    Of a fused projection: ``start`` is where the first head begins, ``stride`` how far it is to the next, and the
    head is at ``inner`` within that.
    """

    dim = -2

    def __init__(
        self,
        count: int,
        size: int,
        *,
        chosen: Chosen = None,
        width: int | None = None,
        start: int = 0,
        stride: int | None = None,
        inner: int = 0,
    ) -> None:
        super().__init__(count, chosen=chosen)
        self.size, self.stride = size, size if stride is None else stride
        self.width = count * self.stride if width is None else width
        self.start, self.inner = start, inner
        self._fused = self.width != count * size

    def __repr__(self) -> str:
        return f"FlatHeads({self.count}, {self.size}, {self.chosen}, {self.start}, {self.inner})"

    @property
    def local_dim(self) -> int:
        return -1

    @property
    def whole(self) -> bool:
        return self.chosen is None and not self._fused

    def seen(self, value: Tensor) -> Tensor:
        if self.width != self.count * self.stride:
            value = value.narrow(-1, self.start, self.count * self.stride)
        heads: Tensor = value.unflatten(-1, (value.shape[-1] // self.stride, self.stride))  # type: ignore[no-untyped-call]
        return heads.narrow(-1, self.inner, self.size) if self._fused and self.stride != self.size else heads

    def put(self, value: Tensor, new: Tensor) -> Tensor:
        return new.flatten(-2) if self.whole else super().put(value, new)

    def _cut_by_heads(self, local: Tensor, layout: Layout, axes: Sequence[int]) -> bool:
        whole = self.width == self.count * self.stride and local.shape[-1] % self.stride == 0
        return whole and super()._cut_by_heads(local, layout, axes)

    def _checked(self, value: Tensor) -> Tensor:
        if value.shape[-1] != self.width:
            raise ShapeError(
                f"expected {self.count} heads of {self.size} in a last dim of {self.width}, "
                f"the value is {tuple(value.shape)}."
            )
        return value
