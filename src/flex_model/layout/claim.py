"""From evidence to claims: what each rank can know of a layout by itself. All ranks then settle them together.

Evidence, the first that speaks for an axis wins: the user's override; the value (a DTensor); the engine's rules; for
tensor axes the meta twin, for data axes the probe. One rank's refusal is everybody's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from flex_model.layout.layout import replicates, shard_dim
from flex_model.layout.mesh import ModelMesh
from flex_model.layout.probe import BatchDim
from flex_model.layout.sequence import Order
from flex_model.layout.values import Digest, digest, interned

__all__ = ["Claim", "Evidence", "claim"]

_REPLICATE = Replicate()
_Pair = tuple[Placement, str]  # and who says so


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that one rank knows of one value. ``stated`` are placements by axis index, with the word of who says so."""

    where: str
    stated: Mapping[int, tuple[Placement, str]] = field(default_factory=dict)
    twin: tuple[int, ...] | None = None  # global shape
    twin_twice: Callable[[], tuple[int, ...] | None] = lambda: None  # at twice the batch
    twin_failure: str = ""
    batch: BatchDim | None = None
    sequence: BatchDim | None = None
    sequence_order: Order | str = "nothing says it"
    expected_shape: tuple[int | None, ...] | None = None
    unknown: str = ""  # why there is no whole
    late: tuple[int, ...] = ()  # axes along which gradients of replicas are parts of a sum
    sharding: frozenset[tuple[int, ...]] = frozenset()  # ranks along axes over which some parameter is sharded
    # split factor of a sharded dim of this full size, or why its order is unknown
    order: Callable[[int, int], int | str] = lambda dim, size: 1
    rows: bool = False  # dim 0 is tokens at experts, as many as it happens to be
    parted: tuple[int, ...] = ()  # the axes along which ranks hold rows of their own


@dataclass(frozen=True, slots=True)
class Claim:
    """What one rank holds a site's layout to be, or why it refuses."""

    where: str
    shape: tuple[int, ...]
    digest: Digest
    placements: tuple[Placement, ...] = ()
    sources: tuple[str, ...] = ()
    global_shape: tuple[int | None, ...] = ()
    late: tuple[int, ...] = ()
    refusal: str = ""
    passing: bool = False  # the refusal may not last: the model raised when it was probed, or was not
    parted: tuple[int, ...] = ()


class _Refusal(Exception):
    def __init__(self, reason: str, *, passing: bool = False) -> None:
        super().__init__(reason)
        self.passing = passing


def claim(value: Tensor, evidence: Evidence, mesh: ModelMesh) -> Claim:
    """This rank's claim for the local tensor ``value``."""
    mark = digest(value)
    shape = mark.shape
    try:
        placements, sources = _placements(shape, evidence, mesh)
    except _Refusal as refusal:
        return Claim(evidence.where, shape, mark, refusal=str(refusal), passing=refusal.passing)
    full: tuple[int | None, ...] = (None,) * len(shape)
    if evidence.twin is not None and len(evidence.twin) == len(shape):
        grow = [found.dim for found in (evidence.batch, evidence.sequence) if found is not None]
        open_dims = {*grow, *([0] if evidence.rows else [])}
        full = interned(tuple([None if d in open_dims else s for d, s in enumerate(evidence.twin)]))
    late = tuple(i for i in evidence.late if replicates(placements[i])) if evidence.late else ()
    return Claim(evidence.where, shape, mark, placements, sources, full, late=late, parted=evidence.parted)


def _placements(
    shape: tuple[int, ...], evidence: Evidence, mesh: ModelMesh
) -> tuple[tuple[Placement, ...], tuple[str, ...]]:
    if evidence.unknown:
        raise _Refusal(evidence.unknown)
    chosen: dict[int, _Pair] = dict(evidence.stated)
    data: list[int] = []
    sequence: list[int] = []
    tensor: list[int] = []
    for i, axis in enumerate(mesh.axes):
        if i not in chosen:
            (sequence if axis.sequence else data if axis.kind == "data" else tensor).append(i)
    batch_dim = None
    if data:
        batch_dim = _known(evidence.batch, "batch")
        chosen.update(dict.fromkeys(data, _along("batch", Shard, batch_dim)))
    for i in sequence:
        chosen[i] = _sequence_placement(evidence, mesh, i)
    if tensor:
        chosen.update(_tensor_placements(shape, evidence, mesh, tensor, batch_dim))
    ordered = [chosen[i] for i in range(len(mesh.axes))]
    for placement, source in ordered:
        dim = shard_dim(placement)
        if dim is not None and not 0 <= dim < len(shape):
            raise _Refusal(f"{source} says {placement}, but the value has {len(shape)} dims")
    return _kept(tuple([(type(p), p, s) for p, s in ordered]))


@lru_cache(maxsize=1024)
def _kept(
    given: tuple[tuple[type[Placement], Placement, str], ...],
) -> tuple[tuple[Placement, ...], tuple[str, ...]]:
    """The same two objects for all sites that lie alike; placements of two types may be equal."""
    return tuple(p for _, p, _ in given), tuple(s for _, _, s in given)


@lru_cache(maxsize=256)
def _along(word: str, way: Order, dim: int | None) -> _Pair:
    """Of a probed axis."""
    if dim is None:
        return _REPLICATE, f"probe: no {word} dim"
    return way(dim), f"probe: dim {dim} is the {word}"


def _known(found: BatchDim | None, word: str) -> int | None:
    if found is None:
        raise _Refusal(f"it did not fire while the {word} was probed")
    if found.refusal:
        raise _Refusal(found.refusal, passing=found.failed)
    return found.dim


def _sequence_placement(evidence: Evidence, mesh: ModelMesh, axis: int) -> _Pair:
    dim, order = _known(evidence.sequence, "sequence"), evidence.sequence_order
    if dim is not None and isinstance(order, str):
        name = mesh.names[axis]
        raise _Refusal(
            f"dim {dim} is the sequence, in parts over {name!r}, and their order is unknown: {order}; "
            f"pass layout={{{name!r}: ZigZag({dim})}} (flex_model.ZigZag), or Shard({dim}) for contiguous parts"
        )
    return _along("sequence", Shard if isinstance(order, str) else order, dim)


def _tensor_placements(
    shape: tuple[int, ...], evidence: Evidence, mesh: ModelMesh, axes: Sequence[int], batch_dim: int | None
) -> dict[int, _Pair]:
    full, word = _full_shape(shape, evidence)
    grown = [d for d, (a, b) in enumerate(zip(shape, full, strict=True)) if a != b and not (evidence.rows and d == 0)]
    if not grown:
        return dict.fromkeys(axes, (_REPLICATE, word))
    if len(grown) > 1:
        raise _Refusal(f"several dims differ: {shape} here, {full} by the {word}")
    dim = grown[0]
    if batch_dim == dim or (word == "twin" and _grows(dim, full, evidence)):
        raise _Refusal(f"dim {dim} is sharded over a tensor axis and also holds the batch, so its order is unknown")
    order = evidence.order(dim, full[dim])
    if isinstance(order, str):
        raise _Refusal(order)
    holders = [i for i in axes if len(axes) == 1 or shape[dim] * mesh.axes[i].size == full[dim]]
    if len(holders) > 1:  # over the others it must then be the same, which is checked
        holders = [i for i in holders if mesh.axes[i].ranks in evidence.sharding]
    if len(holders) != 1:
        raise _Refusal(f"dim {dim} ({shape[dim]} of {full[dim]}) fits none or several of the tensor axes")
    placement = Shard(dim) if order == 1 else _StridedShard(dim, split_factor=order)
    return {**dict.fromkeys(axes, (_REPLICATE, word)), holders[0]: (placement, word)}


def _grows(dim: int, full: tuple[int, ...], evidence: Evidence) -> bool:
    """Whether a dim grows with the batch, by the probe or else by another run of the twin."""
    if evidence.batch is not None and not evidence.batch.refusal:
        return evidence.batch.dim == dim
    twice = evidence.twin_twice()
    if twice is None:
        raise _Refusal("the twin has no such value at twice the batch")
    return len(twice) != len(full) or twice[dim] != full[dim]


def _full_shape(shape: tuple[int, ...], evidence: Evidence) -> tuple[tuple[int, ...], str]:
    """The global shape on tensor axes, by the twin or else by what the user expects."""
    if evidence.twin is not None:
        if len(evidence.twin) != len(shape):
            raise _Refusal(f"the twin has {evidence.twin}, here it is {shape}")
        return evidence.twin, "twin"
    if evidence.expected_shape is not None:
        if len(evidence.expected_shape) != len(shape):
            raise _Refusal(f"expected_shape has {len(evidence.expected_shape)} dims, the value has {len(shape)}")
        expected = zip(evidence.expected_shape, shape, strict=True)
        return tuple(s if e is None else e for e, s in expected), "expected_shape"
    raise _Refusal(f"the twin has no such value ({evidence.twin_failure or 'it did not fire there'})")
