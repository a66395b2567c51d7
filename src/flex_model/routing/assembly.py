"""Putting parts together on one rank, and taking a rank's part: the arithmetic of layouts over several axes.

No communication happens here. ``parts`` and ``shapes`` are indexed by group rank, the order of ``mesh.ranks``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.distributed.tensor import Partial, Replicate
from torch.distributed.tensor.placement_types import Placement

from flex_model.layout.layout import Layout, ZigZag, fits, merge_parts, my_part, shard_dim, split_factor
from flex_model.layout.mesh import ModelMesh

__all__ = [
    "NoRectangle",
    "Parts",
    "Shapes",
    "assemble",
    "merge",
    "owners",
    "owns",
    "part_of",
    "place_of",
    "size_below",
]


@dataclass(frozen=True)
class Parts:
    """What has no rectangular whole: the ranks' tensors in rank order, and the coordinate of each in the mesh.

    >>> Parts((torch.ones(2, 3), torch.ones(2, 4)), ({"dp": 0}, {"dp": 1}))[1].shape
    torch.Size([2, 4])

    Where rows are tokens at experts, ``tokens`` and ``experts`` hold one index tensor a part: which token of the whole
    batch each row is, and which expert it is at. To bring them back into the order of the batch, summed over experts:

    >>> parts = Parts((torch.ones(2, 3), torch.ones(1, 3)), ({"dp": 0}, {"dp": 1}),
    ...               (torch.tensor([0, 1]), torch.tensor([1])), (torch.tensor([0, 0]), torch.tensor([3])))
    >>> whole = torch.zeros(2, 3)
    >>> for rows, tokens in zip(parts.tensors, parts.tokens):
    ...     whole.index_add_(0, tokens, rows)[:, 0].tolist()
    [1.0, 1.0]
    [1.0, 2.0]
    """

    tensors: tuple[Tensor, ...]
    coordinates: tuple[dict[str, int], ...]
    tokens: tuple[Tensor, ...] = ()
    experts: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, index: int) -> Tensor:
        return self.tensors[index]


class Shapes(Sequence[tuple[int, ...]]):
    """The shape of a value's local tensor on every rank, by group rank: kept once where all have the same.

    >>> Shapes([(2, 3)], size=1024)[1000]
    (2, 3)
    """

    def __init__(self, known: Sequence[tuple[int, ...]], size: int) -> None:
        self._known, self._size = list(known), size

    @property
    def even(self) -> bool:
        return len(self._known) == 1

    @property
    def largest(self) -> int:
        """Elements of the largest part."""
        return max(prod(s) for s in self._known)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, rank: Any) -> Any:
        return self._known[0 if self.even else rank]


def owns(mesh: ModelMesh, layout: Layout) -> bool:
    """Whether this rank holds data that is delivered: on replicated axes the main rank's coordinate does."""
    moving = layout.moving_axes
    return all(mesh.coordinate[i] == mesh.home[i] for i in range(len(mesh.axes)) if i not in moving)


def owners(mesh: ModelMesh, layout: Layout) -> list[int]:
    """Group ranks that hold distinct data, one a shard."""
    moving = layout.moving_axes
    places = [range(a.size) if i in moving else (mesh.home[i],) for i, a in enumerate(mesh.axes)]
    return [mesh.group_rank(c) for c in product(*places)]


def merge(parts: Sequence[Tensor], placement: Placement) -> Tensor:
    """The tensors of one line of ranks as one; raises NoRectangle where they make none."""
    dim = shard_dim(placement)
    if split_factor(placement) == 1 and dim is not None and not isinstance(placement, ZigZag):
        parts = [p for p in parts if p.shape[dim]] or parts[:1]  # a rank without rows has no say in the other dims
    if not fits(placement, [p.shape for p in parts]):
        raise NoRectangle
    return merge_parts(parts, placement)


def assemble(parts: Mapping[int, Tensor], layout: Layout, mesh: ModelMesh) -> Tensor | Parts:
    """The full tensor from the owners' parts, or ``Parts`` where they make no rectangle."""

    def build(prefix: tuple[int, ...], part: Mapping[int, int] = MappingProxyType({})) -> Tensor:
        axis = len(prefix)
        if axis == len(mesh.axes):
            return parts[mesh.group_rank(prefix)]
        placement = layout.placements[axis]
        if axis in part:
            return build((*prefix, part[axis]), part)
        if isinstance(placement, Replicate):
            return build((*prefix, mesh.home[axis]), part)
        return merge([build((*prefix, i), part) for i in range(mesh.axes[axis].size)], placement)

    if layout.parted:
        places = [
            dict(zip(layout.parted, c, strict=True))
            for c in product(*(range(mesh.axes[i].size) for i in layout.parted))
        ]
        return Parts(
            tuple(build((), place) for place in places),
            tuple({mesh.names[i]: at for i, at in place.items()} for place in places),
        )
    try:
        return build(())
    except NoRectangle:
        cells = [(mesh.coordinate_of(r), parts[r]) for r in sorted(parts)]
        named = tuple(dict(zip(mesh.names, c, strict=True)) for c, _ in cells)
        return Parts(tuple(p for _, p in cells), named)


class NoRectangle(Exception):
    """The ranks' parts have no rectangular whole."""


def place_of(full: Tensor, layout: Layout, mesh: ModelMesh, rank: int) -> Tensor:
    """The view of ``full`` where the part of group rank ``rank`` lies; all have one shape, the layout places."""
    for axis, at in enumerate(mesh.coordinate_of(rank)):
        dim = shard_dim(layout.placements[axis])
        if dim is not None:
            size = full.shape[dim] // mesh.axes[axis].size
            full = full.narrow(dim, at * size, size)
    return full


def size_below(
    layout: Layout, mesh: ModelMesh, shapes: Sequence[Sequence[int]], prefix: tuple[int, ...], dim: int
) -> int:
    """The size on ``dim`` of what all ranks below ``prefix`` hold together."""
    axis = len(prefix)
    if axis == len(mesh.axes):
        return shapes[mesh.group_rank(prefix)][dim]
    if shard_dim(layout.placements[axis]) != dim:
        return size_below(layout, mesh, shapes, (*prefix, 0), dim)
    return sum(size_below(layout, mesh, shapes, (*prefix, i), dim) for i in range(mesh.axes[axis].size))


def part_of(full: Tensor, layout: Layout, mesh: ModelMesh, shapes: Sequence[Sequence[int]], rank: int) -> Tensor:
    """What group rank ``rank`` holds of ``full``."""
    coordinate = mesh.coordinate_of(rank)
    for axis, placement in enumerate(layout.placements):
        dim, size = shard_dim(placement), mesh.axes[axis].size
        if dim is None:
            if isinstance(placement, Partial):
                full = my_part(full, placement, [1] * size, coordinate[axis])
            continue
        sizes = [size_below(layout, mesh, shapes, (*coordinate[:axis], i), dim) for i in range(size)]
        full = my_part(full, placement, sizes, coordinate[axis])
    return full
