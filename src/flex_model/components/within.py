"""``Within``: the user's selection of what another selection gives, such as the last position of some heads."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flex_model.layout.layout import Layout
from flex_model.layout.mesh import ModelMesh
from flex_model.routing.selection import Selection, Taken

__all__ = ["Within"]


class Within(Selection):
    """``select`` from what ``outer`` gives; gradients are selected alike.

    >>> import torch
    >>> Within(Selection(0), -1).take(torch.arange(4).view(2, 2)).item()
    1
    """

    of_gradients = True

    def __init__(self, outer: Selection, select: Any) -> None:
        inner = Selection.of(select)
        super().__init__(lambda x: inner.take(outer.take(x)))
        self.outer, self.inner, self.select = outer, inner, select

    def put(self, value: Tensor, new: Tensor) -> Tensor:
        return self.outer.put(value, self.inner.put(self.outer.take(value), new))

    def of_shard(self, local: Tensor, layout: Layout, mesh: ModelMesh) -> Taken | None:
        taken = self.outer.of_shard(local, layout, mesh)
        if taken is None or taken.finish is not None:  # not yet what the inner one selects from
            self.failure = self.outer.failure
            return None
        then = self.inner.of_shard(taken.local, taken.layout, mesh)
        self.failure = self.inner.failure
        return then
