"""Putting parts together on one rank, and taking a rank's part: the arithmetic of layouts over several axes.

No communication happens here. ``parts`` and ``shapes`` are indexed by group rank, the order of ``mesh.coordinates()``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType

from torch import Tensor
from torch.distributed.tensor import Partial, Replicate

from flex_model.layout.layout import Layout, merge_parts, my_part, shard_dim, split_factor
from flex_model.layout.mesh import ModelMesh

__all__ = ["Parts", "assemble", "owners", "part_of"]


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


def owners(mesh: ModelMesh, layout: Layout) -> list[int]:
    """Group ranks that hold distinct data, one a shard: on replicated axes the main rank's coordinate."""
    home = mesh.coordinates()[mesh.ranks.index(mesh.main)]
    return [
        r
        for r, c in enumerate(mesh.coordinates())
        if all(not isinstance(p, Replicate) or c[i] == home[i] for i, p in enumerate(layout.placements))
    ]


def _fits(parts: Sequence[Tensor], dim: int | None) -> bool:
    shapes = {tuple(s for d, s in enumerate(p.shape) if d != dim) for p in parts}
    return len(shapes) == 1


def assemble(parts: Mapping[int, Tensor], layout: Layout, mesh: ModelMesh) -> Tensor | Parts:
    """The full tensor from the owners' parts, or ``Parts`` where they make no rectangle."""
    where = {c: r for r, c in enumerate(mesh.coordinates())}
    home = mesh.coordinates()[mesh.ranks.index(mesh.main)]

    def build(prefix: tuple[int, ...], part: Mapping[int, int] = MappingProxyType({})) -> Tensor:
        axis = len(prefix)
        if axis == len(mesh.axes):
            return parts[where[prefix]]
        placement = layout.placements[axis]
        if axis in part:
            return build((*prefix, part[axis]), part)
        if isinstance(placement, Replicate):
            return build((*prefix, home[axis]), part)
        below = [build((*prefix, i), part) for i in range(mesh.axes[axis].size)]
        dim = shard_dim(placement)
        if split_factor(placement) == 1 and dim is not None:
            below = [b for b in below if b.shape[dim]] or below[:1]  # a rank without rows has no say in the other dims
        if not _fits(below, shard_dim(placement)):
            raise _NoRectangle
        return merge_parts(below, placement)

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
    except _NoRectangle:
        cells = [(mesh.coordinates()[r], parts[r]) for r in sorted(parts)]
        named = tuple(dict(zip(mesh.names, c, strict=True)) for c, _ in cells)
        return Parts(tuple(p for _, p in cells), named)


class _NoRectangle(Exception):
    pass


def _size_below(
    layout: Layout, mesh: ModelMesh, shapes: Sequence[Sequence[int]], prefix: tuple[int, ...], dim: int
) -> int:
    """The size on ``dim`` of what all ranks below ``prefix`` hold together."""
    where = {c: r for r, c in enumerate(mesh.coordinates())}
    axis = len(prefix)
    if axis == len(mesh.axes):
        return shapes[where[prefix]][dim]
    if shard_dim(layout.placements[axis]) != dim:
        return _size_below(layout, mesh, shapes, (*prefix, 0), dim)
    return sum(_size_below(layout, mesh, shapes, (*prefix, i), dim) for i in range(mesh.axes[axis].size))


def part_of(full: Tensor, layout: Layout, mesh: ModelMesh, shapes: Sequence[Sequence[int]], rank: int) -> Tensor:
    """What group rank ``rank`` holds of ``full``."""
    coordinate = mesh.coordinates()[rank]
    for axis, placement in enumerate(layout.placements):
        dim, size = shard_dim(placement), mesh.axes[axis].size
        if dim is None:
            if isinstance(placement, Partial):
                full = my_part(full, placement, [1] * size, coordinate[axis])
            continue
        sizes = [_size_below(layout, mesh, shapes, (*coordinate[:axis], i), dim) for i in range(size)]
        full = my_part(full, placement, sizes, coordinate[axis])
    return full
