"""From evidence to layouts: each rank claims what it can know, then all ranks verify the claims together.

Evidence, the first that speaks for an axis wins: the user's override; the value (a DTensor); the engine's rules; for
tensor axes the meta twin, for data axes the probe. One rank's refusal is everybody's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from flex_model.errors import LayoutError
from flex_model.layout.layout import Layout, shard_dim
from flex_model.layout.mesh import ModelMesh
from flex_model.layout.probe import BatchDim
from flex_model.layout.values import Digest, digest, same

__all__ = ["Claim", "Evidence", "agree", "agree_alone", "claim"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that one rank knows of one value. ``stated`` are placements by axis index, with the word of who says so."""

    where: str
    stated: Mapping[int, tuple[Placement, str]] = field(default_factory=dict)
    twin: tuple[int, ...] | None = None  # global shape
    twin_twice: tuple[int, ...] | None = None  # at twice the batch
    twin_failure: str = ""
    batch: BatchDim | None = None
    expected_shape: tuple[int | None, ...] | None = None
    unknown: str = ""  # why there is no whole
    late: tuple[int, ...] = ()  # axes along which gradients of replicas are parts of a sum
    # split factor of a sharded dim of this full size, or why its order is unknown
    order: Callable[[int, int], int | str] = lambda dim, size: 1
    rows: bool = False  # dim 0 is tokens at experts, as many as it happens to be
    parted: tuple[int, ...] = ()  # the axes along which ranks hold rows of their own


@dataclass(frozen=True, slots=True)
class Claim:
    """What one rank holds a site's layout to be, or why it refuses; sent to all ranks."""

    where: str
    shape: tuple[int, ...]
    digest: Digest
    placements: tuple[Placement, ...] = ()
    sources: tuple[str, ...] = ()
    global_shape: tuple[int | None, ...] = ()
    late: tuple[int, ...] = ()
    refusal: str = ""
    parted: tuple[int, ...] = ()


class _Refusal(Exception):
    pass


def claim(value: Tensor, evidence: Evidence, mesh: ModelMesh) -> Claim:
    """This rank's claim for the local tensor ``value``."""
    shape, mark = tuple(value.shape), digest(value)
    try:
        placements, sources = _placements(shape, evidence, mesh)
    except _Refusal as refusal:
        return Claim(evidence.where, shape, mark, refusal=str(refusal))
    full: tuple[int | None, ...] = tuple(None for _ in shape)
    if evidence.twin is not None and len(evidence.twin) == len(shape):
        batch = evidence.batch.dim if evidence.batch else None
        open_dims = {batch, 0 if evidence.rows else batch}
        full = tuple(None if d in open_dims else s for d, s in enumerate(evidence.twin))
    late = tuple(i for i in evidence.late if isinstance(placements[i], Replicate))
    return Claim(evidence.where, shape, mark, placements, sources, full, late=late, parted=evidence.parted)


def _placements(
    shape: tuple[int, ...], evidence: Evidence, mesh: ModelMesh
) -> tuple[tuple[Placement, ...], tuple[str, ...]]:
    if evidence.unknown:
        raise _Refusal(evidence.unknown)
    chosen: dict[int, tuple[Placement, str]] = dict(evidence.stated)
    data = [i for i, a in enumerate(mesh.axes) if a.kind == "data" and i not in chosen]
    tensor = [i for i, a in enumerate(mesh.axes) if a.kind == "tensor" and i not in chosen]
    batch_dim = None
    if data:
        batch_dim = _batch_dim(shape, evidence)
        word = "probe: no batch dim" if batch_dim is None else f"probe: dim {batch_dim} is the batch"
        for i in data:
            chosen[i] = (Replicate() if batch_dim is None else Shard(batch_dim), word)
    if tensor:
        for i, pair in _tensor_placements(shape, evidence, mesh, tensor, batch_dim).items():
            chosen[i] = pair
    ordered = [chosen[i] for i in range(len(mesh.axes))]
    for placement, source in ordered:
        dim = shard_dim(placement)
        if dim is not None and not 0 <= dim < len(shape):
            raise _Refusal(f"{source} says {placement}, but the value has {len(shape)} dims")
    return tuple(p for p, _ in ordered), tuple(s for _, s in ordered)


def _batch_dim(shape: tuple[int, ...], evidence: Evidence) -> int | None:
    if evidence.batch is None:
        raise _Refusal("it did not fire while the batch was probed")
    if evidence.batch.refusal:
        raise _Refusal(evidence.batch.refusal)
    return evidence.batch.dim


def _tensor_placements(
    shape: tuple[int, ...], evidence: Evidence, mesh: ModelMesh, axes: Sequence[int], batch_dim: int | None
) -> dict[int, tuple[Placement, str]]:
    full, word = _full_shape(shape, evidence)
    grown = [d for d, (a, b) in enumerate(zip(shape, full, strict=True)) if a != b and not (evidence.rows and d == 0)]
    if not grown:
        return {i: (Replicate(), word) for i in axes}
    if len(grown) > 1:
        raise _Refusal(f"several dims differ: {shape} here, {full} by the {word}")
    dim = grown[0]
    if evidence.twin_twice is not None and evidence.twin is not None and word == "twin":
        if len(evidence.twin_twice) != len(full) or evidence.twin_twice[dim] != full[dim]:
            raise _Refusal(f"dim {dim} is sharded and also grows with the batch, so its order is unknown")
    elif batch_dim == dim:
        raise _Refusal(f"dim {dim} is sharded over a tensor axis and also holds the batch, so its order is unknown")
    order = evidence.order(dim, full[dim])
    if isinstance(order, str):
        raise _Refusal(order)
    holders = [i for i in axes if len(axes) == 1 or shape[dim] * mesh.axes[i].size == full[dim]]
    if len(holders) != 1:
        raise _Refusal(f"dim {dim} ({shape[dim]} of {full[dim]}) fits none or several of the tensor axes")
    placement = Shard(dim) if order == 1 else _StridedShard(dim, split_factor=order)
    out: dict[int, tuple[Placement, str]] = {i: (Replicate(), word) for i in axes}
    out[holders[0]] = (placement, word)
    return out


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


# -- verification ----------------------------------------------------------------------------------------------
def agree(everyone: Sequence[Claim | None], mesh: ModelMesh) -> Layout | LayoutError:
    """The layout that all ranks' claims (in group order) support together, or the error that refuses it."""
    claims = [c for c in everyone if c is not None]
    if claims[0].parted:
        everyone = claims = [c or _no_rows(claims[0]) for c in everyone]
    where = claims[0].where
    ranks = mesh.ranks
    if len(claims) != len(everyone):
        absent = [ranks[i] for i, c in enumerate(everyone) if c is None]
        return _error(where, f"it fired on some ranks but not on ranks {absent}", claims, mesh)
    for i, c in enumerate(claims):
        if c.refusal:
            return _error(where, f"{c.refusal} (rank {ranks[i]})", claims, mesh)
    first = claims[0]
    if any(c.placements != first.placements for c in claims):
        seen = sorted({str(list(c.placements)) for c in claims})
        return _error(where, f"ranks found different placements: {' and '.join(seen)}", claims, mesh)
    if any(len(c.shape) != len(first.shape) for c in claims):
        return _error(where, "ranks hold different numbers of dims", claims, mesh)
    proven, problem = True, ""
    for axis, placement in enumerate(first.placements):
        if isinstance(placement, Replicate):
            sure, problem = _check_replicas(axis, claims, mesh)
            proven = proven and sure
        elif mesh.axes[axis].kind == "tensor" and shard_dim(placement) is not None and axis not in first.parted:
            problem = _check_sizes(axis, claims, mesh)
        if problem:
            return _error(where, problem, claims, mesh)
    ragged = tuple(_is_ragged(axis, claims, mesh) for axis in range(len(mesh.axes)))
    evidence = "; ".join(f"{n}: {s}" for n, s in zip(mesh.names, first.sources, strict=True))
    shape = _global_shape(claims, mesh)
    return Layout(first.placements, evidence, shape, ragged, proven, late=first.late, parted=first.parted)


def agree_alone(one: Claim, mesh: ModelMesh) -> Layout | LayoutError:
    """The layout of rows at experts by this rank's claim alone: other ranks may have none of them to claim with."""
    if one.refusal:
        return _error(one.where, one.refusal, [one], mesh)
    dims = [shard_dim(p) for p in one.placements]
    sizes = [None if d is None or not one.global_shape else one.global_shape[d] for d in dims]
    ragged = tuple(
        d is not None and (i in one.parted or s != one.shape[d] * mesh.axes[i].size)
        for i, (d, s) in enumerate(zip(dims, sizes, strict=True))
    )
    evidence = "; ".join(f"{n}: {s}" for n, s in zip(mesh.names, one.sources, strict=True))
    return Layout(one.placements, evidence, one.shape, ragged, parted=one.parted)


def _no_rows(other: Claim) -> Claim:
    shape = (0, *other.shape[1:])
    return replace(other, shape=shape, digest=replace(other.digest, shape=shape))


def _check_replicas(axis: int, claims: Sequence[Claim], mesh: ModelMesh) -> tuple[bool, str]:
    """Whether the claimed replicas are proven equal, and what is wrong if they are not."""
    for line in mesh.lines(axis):
        if not same([claims[r].digest for r in line]):
            shapes = [claims[r].shape for r in line]
            return False, f"it should be the same along {mesh.names[axis]!r} and is not (shapes {shapes})"
    return all(not c.digest.proves_nothing for c in claims), ""


def _check_sizes(axis: int, claims: Sequence[Claim], mesh: ModelMesh) -> str:
    for line in mesh.lines(axis):
        dim = shard_dim(claims[line[0]].placements[axis])
        assert dim is not None
        also = [i for i, p in enumerate(claims[0].placements) if shard_dim(p) == dim and i != axis]
        want = claims[line[0]].global_shape[dim]
        total = sum(claims[r].shape[dim] for r in line)
        if want is not None and not also and total != want:
            return f"the sizes along {mesh.names[axis]!r} add up to {total} on dim {dim}, not to {want}"
    return ""


def _is_ragged(axis: int, claims: Sequence[Claim], mesh: ModelMesh) -> bool:
    dim = shard_dim(claims[0].placements[axis])
    if dim is None:
        return False
    if mesh.axes[axis].kind == "data" or axis in claims[0].parted:
        return True
    return any(len({claims[r].shape[dim] for r in line}) > 1 for line in mesh.lines(axis))


def _global_shape(claims: Sequence[Claim], mesh: ModelMesh) -> tuple[int, ...]:
    shape = list(claims[0].shape)
    for axis, placement in enumerate(claims[0].placements):
        dim = shard_dim(placement)
        if dim is not None:
            sizes = [claims[r].shape[dim] for r in mesh.lines(axis)[0]]
            shape[dim] = shape[dim] // sizes[0] * sum(sizes) if sizes[0] else sum(sizes)
    return tuple(shape)


def _error(where: str, reason: str, claims: Sequence[Claim], mesh: ModelMesh) -> LayoutError:
    shapes = dict(zip(mesh.ranks, [c.shape for c in claims], strict=False))
    hint = ", ".join(f"{n!r}: Shard(dim) or Replicate()" for n in mesh.names)
    return LayoutError(
        f"{where}: the full value is unknown: {reason}. Local shapes by rank: {shapes}. "
        f"If you know how it lies, pass layout={{{hint}}} to the HookFunction."
    )
