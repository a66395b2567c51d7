"""``Part``: where one rank's part of a value lies in the whole, for edits that need no more than their own part."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from flex_model.errors import EditError
from flex_model.layout.layout import Layout, shard_dim
from flex_model.layout.mesh import ModelMesh

__all__ = ["WHOLE", "NeedsTheWhole", "Part"]


class NeedsTheWhole(Exception):
    """The edit has to know of a dim what this rank alone cannot say."""


class Span(NamedTuple):
    start: int
    size: int
    full: int


class Part:
    """The spans of the sharded dims, which are counted from the last; None where ranks' sizes may differ.

    >>> Part({-1: Span(2, 2, 4)})(torch.arange(4)).tolist()
    [2, 3]
    """

    def __init__(self, spans: dict[int, Span | None]) -> None:
        self._spans = spans

    @classmethod
    def of(cls, local: Tensor, layout: Layout, mesh: ModelMesh) -> Part | None:
        """Of this rank's shard; None if it is no rectangle of the whole."""
        if not layout.has_places:
            return None
        spans: dict[int, Span | None] = {}
        for axis, placement in reversed(list(enumerate(layout.placements))):  # the inner ones first
            if (dim := shard_dim(placement)) is None:
                continue
            dim -= local.dim()
            inner = spans.get(dim, Span(0, local.shape[dim], local.shape[dim]))
            if inner is None or (layout.ragged and layout.ragged[axis]):
                spans[dim] = None
                continue
            before = mesh.coordinate[axis] * inner.full
            spans[dim] = Span(before + inner.start, inner.size, mesh.axes[axis].size * inner.full)
        return cls(spans)

    def __call__(self, tensor: Tensor) -> Tensor:
        """This rank's part of what broadcasts against the whole value."""
        for dim, span in self._spans.items():
            if -dim > tensor.dim() or tensor.shape[dim] == 1:
                continue
            if span is None:
                raise NeedsTheWhole
            if tensor.shape[dim] != span.full:
                raise EditError(
                    f"a tensor of the shape {tuple(tensor.shape)} does not fit beside a value that has {span.full} "
                    f"places in dim {dim}.",
                    page="preset-arguments",
                )
            tensor = tensor.narrow(dim, span.start, span.size)
        return tensor

    def size(self, local: Tensor, dim: int) -> int:
        """How many places the whole value has in ``dim``."""
        dim = dim - local.dim() if dim >= 0 else dim
        if dim not in self._spans:
            return local.shape[dim]
        if (span := self._spans[dim]) is None:
            raise NeedsTheWhole
        return span.full


WHOLE = Part({})
