"""``Layout``: how the local tensors of a site make up the full one, and what that is known from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from flex_model.errors import LayoutError
from flex_model.layout.mesh import ModelMesh

__all__ = [
    "Layout",
    "ZigZag",
    "fits",
    "merge_parts",
    "my_part",
    "on_dim",
    "parse_layout",
    "replicates",
    "shard_dim",
    "split_factor",
]


@dataclass(frozen=True)
class ZigZag(Placement):
    """The sequence on ``dim``, balanced for causal attention: of 2w chunks, rank r of w holds chunks r and 2w-1-r.

    >>> merge_parts([torch.tensor([0, 1, 6, 7]), torch.tensor([2, 3, 4, 5])], ZigZag(0)).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """

    dim: int

    def __post_init__(self) -> None:
        Placement.__init__(self)  # before torch 2.13 its base class is not Python's

    def __repr__(self) -> str:
        return f"ZigZag(dim={self.dim})"

    def __str__(self) -> str:
        return f"Z({self.dim})"

    def __reduce__(self) -> tuple[type[ZigZag], tuple[int]]:
        return ZigZag, (self.dim,)


def shard_dim(placement: Placement) -> int | None:
    """The dim a placement shards, None for Replicate and Partial."""
    return placement.dim if _shards(type(placement)) else None  # type: ignore[arg-type,attr-defined,no-any-return]


@cache
def _shards(kind: type[Placement]) -> bool:
    return issubclass(kind, (Shard, _StridedShard, ZigZag))  # isinstance asks Python code of torch's each time


def replicates(placement: Placement) -> bool:
    return _replicates(type(placement))  # type: ignore[arg-type]


@cache
def _replicates(kind: type[Placement]) -> bool:
    return issubclass(kind, Replicate)


def on_dim(placement: Placement, dim: int) -> Placement:
    """A sharding placement as it would be on another dim."""
    if isinstance(placement, ZigZag):
        return ZigZag(dim)
    factor = split_factor(placement)
    return Shard(dim) if factor == 1 else _StridedShard(dim, split_factor=factor)


def fits(placement: Placement, shapes: Sequence[Sequence[int]]) -> bool:
    """Whether parts of these shapes make a rectangle along one axis, and in zig-zag whole chunks of one size."""
    dim = shard_dim(placement)
    if isinstance(placement, ZigZag) and (len({s[placement.dim] for s in shapes}) > 1 or shapes[0][placement.dim] % 2):
        return False
    return len({tuple(s for d, s in enumerate(shape) if d != dim) for shape in shapes}) == 1


def split_factor(placement: Placement) -> int:
    """How many blocks (fused projections) the full dim consists of, each sharded over all ranks; 1 if plain."""
    return int(placement.split_factor) if isinstance(placement, _StridedShard) else 1


@dataclass(frozen=True, slots=True)
class Layout:
    """One placement per axis of the model's mesh, plus what was seen when it was found.

    ``ragged`` names the axes whose shard sizes differ or may differ from call to call, so that they travel with the
    value. ``shape`` is the global shape at the moment of inference; it changes with batch and sequence. ``late`` names
    axes along which the value is the same, and its gradient on each rank only a part of the sum. ``parted`` are
    the axes along which each rank's rows stay a part for itself, because they are tokens at its experts.
    """

    placements: tuple[Placement, ...]
    evidence: str
    shape: tuple[int, ...] = ()
    ragged: tuple[bool, ...] = ()
    proven: bool = True
    late: tuple[int, ...] = ()
    parted: tuple[int, ...] = ()
    sharded_axes: tuple[int, ...] = field(init=False, repr=False, compare=False)
    moving_axes: tuple[int, ...] = field(init=False, repr=False, compare=False)  # over which data moves to make it full
    has_places: bool = field(init=False, repr=False, compare=False)  # each part is one rectangle of the full tensor

    def __post_init__(self) -> None:
        """What every firing of a hook asks for is found once."""
        sharded = tuple(i for i, p in enumerate(self.placements) if shard_dim(p) is not None)
        moving = tuple(i for i, p in enumerate(self.placements) if not replicates(p))
        plain = sharded == moving and not any(
            isinstance(p := self.placements[i], ZigZag) or split_factor(p) > 1 for i in sharded
        )
        object.__setattr__(self, "sharded_axes", sharded)
        object.__setattr__(self, "moving_axes", moving)
        object.__setattr__(self, "has_places", plain and not self.parted)

    def with_evidence(self, evidence: str) -> Layout:
        return replace(self, evidence=evidence)


def parse_layout(given: object, mesh: ModelMesh, where: str) -> dict[int, Placement]:
    """``layout=`` of a HookFunction as {axis index: placement}; unnamed axes stay to be found."""
    if isinstance(given, Layout):
        given = given.placements
    if isinstance(given, Placement):
        given = [given]
    if isinstance(given, Mapping):
        values: list[object] = list(given.values())
    elif isinstance(given, Sequence) and not isinstance(given, str):
        values = list(given)
    else:
        raise LayoutError(
            f"{where}: layout={given!r} is no layout; expected placements, such as {{'tp': Shard(2)}}.",
            page="layout-argument",
        )
    for placement in values:
        if not isinstance(placement, (Shard, _StridedShard, ZigZag, Replicate, Partial)):
            raise LayoutError(
                f"{where}: {placement!r} in layout= is no Shard, Replicate or Partial.", page="layout-argument"
            )
    if not mesh.axes:
        return {}
    if isinstance(given, Mapping):
        unknown = [n for n in given if n not in mesh.names]
        if unknown:
            raise LayoutError(
                f"{where}: layout= names the axis {unknown[0]!r}; the model's axes are {list(mesh.names)}.",
                page="layout-argument",
            )
        return {mesh.names.index(n): p for n, p in given.items()}
    if len(values) != len(mesh.axes):
        raise LayoutError(
            f"{where}: layout= has {len(values)} placements; the model's mesh has {len(mesh.axes)} axes "
            f"{list(mesh.names)}, one placement each is expected.",
            page="layout-argument",
        )
    return dict(enumerate(values))  # type: ignore[arg-type]


def merge_parts(parts: Sequence[torch.Tensor], placement: Placement) -> torch.Tensor:
    """The full tensor along one axis, from the ranks' parts in rank order.

    >>> merge_parts([torch.tensor([0, 2]), torch.tensor([1, 3])], _StridedShard(0, split_factor=2)).tolist()
    [0, 1, 2, 3]
    """
    dim = shard_dim(placement)
    if dim is None:
        if isinstance(placement, Partial):
            total = torch.stack(list(parts)).sum(0)
            return total / len(parts) if placement.reduce_op == "avg" else total
        return parts[0]
    if isinstance(placement, ZigZag):
        heads, tails = zip(*(p.chunk(2, dim) for p in parts), strict=True)
        return torch.cat([*heads, *reversed(tails)], dim)
    factor = split_factor(placement)
    if factor > 1:
        chunks = [p.chunk(factor, dim) for p in parts]
        parts = [c for block in zip(*chunks, strict=True) for c in block]
    return torch.cat(list(parts), dim)


def my_part(full: torch.Tensor, placement: Placement, sizes: Sequence[int], index: int) -> torch.Tensor:
    """The part of ``full`` that the ``index``-th rank of an axis holds; ``sizes`` are the ranks' sizes on the dim."""
    dim = shard_dim(placement)
    if dim is None:
        if isinstance(placement, Partial) and placement.reduce_op == "sum":
            return full / len(sizes)
        return full
    if isinstance(placement, ZigZag):
        chunk = sizes[index] // 2
        tail = (2 * len(sizes) - 1 - index) * chunk
        return torch.cat([full.narrow(dim, index * chunk, chunk), full.narrow(dim, tail, chunk)], dim)
    factor = split_factor(placement)
    if factor == 1:
        return full.narrow(dim, sum(sizes[:index]), sizes[index])
    block = full.shape[dim] // factor
    start, size = sum(sizes[:index]) // factor, sizes[index] // factor
    return torch.cat([full.narrow(dim, b * block + start, size) for b in range(factor)], dim)
