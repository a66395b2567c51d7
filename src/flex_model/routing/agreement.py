"""Settling claims with the other ranks, at a cost that does not grow with their number.

First one mark of all claims is compared over the mesh: the same values, the same placements, nobody refuses. Then each
axis is checked along this rank's own line: replicas are equal, shards add up. Of these only the lowest and highest
numbers travel. Last, what any rank found is told to all: one rank's refusal is everybody's. Claims themselves are
exchanged only where ranks disagree, so that the error can name them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from flex_model.errors import LayoutError
from flex_model.layout.claim import Claim
from flex_model.layout.layout import Layout, replicates, shard_dim
from flex_model.layout.mesh import ModelMesh
from flex_model.layout.values import ROW, Digest, mark, prove_nothing, rows
from flex_model.routing.collectives import all_gather_objects, extremes

__all__ = ["settle", "settle_alone"]

Key = TypeVar("Key")
Shape = tuple[int, ...]
_UNSAID = Digest((), torch.empty(0, dtype=torch.double))


@dataclass(slots=True)
class _Site:
    """A claim that all ranks share, while it is checked. ``shape`` grows to the global one, axis by axis."""

    claim: Claim
    shape: list[int]
    problem: str = ""
    unproven: bool = False
    ragged: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ragged = [False] * len(self.claim.placements)


def settle(claims: Mapping[Key, Claim], mesh: ModelMesh) -> dict[Key, Layout | LayoutError]:
    """The layouts that all ranks' claims support, or the errors that refuse them. Collective."""
    found: dict[Key, Layout | LayoutError] = {}
    texts = {key: repr(key) for key in claims}
    claims = {key: claims[key] for key in sorted(claims, key=texts.__getitem__)}
    shared = _shared(claims, texts, mesh, found)
    if not shared:
        return found
    sites = {key: _Site(claim, list(claim.shape)) for key, claim in shared.items()}
    replicas = [s for s in sites.values() if any(map(replicates, s.claim.placements))]
    samples = rows([s.claim.digest for s in replicas])
    for site, unproven in zip(replicas, prove_nothing(samples).tolist(), strict=True):
        site.unproven = unproven
    for axis in reversed(range(len(mesh.axes))):
        _check_axis(axis, list(sites.values()), replicas, samples, mesh)
    _tell(sites, mesh, found)
    return found


# -- the same claims -------------------------------------------------------------------------------------------
def _shared(
    claims: Mapping[Key, Claim], texts: Mapping[Key, str], mesh: ModelMesh, found: dict[Key, Layout | LayoutError]
) -> dict[Key, Claim]:
    """What all ranks claim alike; what is refused goes to ``found``. ``texts``: what the claims' keys print as."""
    held = {id(c.placements): c.placements for c in claims.values()}  # many sites share theirs
    placed = {place: repr(placements) for place, placements in held.items()}
    said = [
        (texts[key], placed[id(c.placements)], c.late, c.parted, len(c.shape), c.refusal, c.shape if c.refusal else ())
        for key, c in claims.items()
    ]
    low, high = extremes(torch.tensor([mark(said)]), mesh.world)
    if torch.equal(low, high):
        for key, c in claims.items():
            if c.refusal:
                found[key] = _refused(c, "every rank", [c.shape] * mesh.size, mesh)
        return {key: c for key, c in claims.items() if key not in found}
    # of samples only those are told that another rank may have to stand in with
    told = {key: c if c.parted else replace(c, digest=_UNSAID) for key, c in claims.items()}
    everyone = all_gather_objects(told, mesh.world)
    shared: dict[Key, Claim] = {}
    for key in sorted({key for theirs in everyone for key in theirs}, key=repr):
        made = [theirs.get(key) for theirs in everyone]
        one = next(c for c in made if c is not None)
        if one.parted:
            made = [c or _no_rows(one) for c in made]
        error = _difference(made, mesh)
        if error is not None:
            found[key] = error
        else:
            shared[key] = claims[key] if key in claims else _no_rows(one)
    return shared


def _no_rows(other: Claim) -> Claim:
    """The claim of a rank that had no rows at experts to claim with."""
    shape = (0, *other.shape[1:])
    return replace(other, shape=shape, digest=replace(other.digest, shape=shape))


def _difference(everyone: Sequence[Claim | None], mesh: ModelMesh) -> LayoutError | None:
    """Why what the ranks claim of a value does not go together."""
    made = [c for c in everyone if c is not None]
    first = made[0]
    where, shapes = first.where, [None if c is None else c.shape for c in everyone]
    if len(made) != len(everyone):
        absent = [mesh.ranks[i] for i, c in enumerate(everyone) if c is None]
        return _error(where, f"it fired on some ranks but not on ranks {absent}", shapes, mesh)
    for rank, c in zip(mesh.ranks, made, strict=True):
        if c.refusal:
            return _refused(c, f"rank {rank}", shapes, mesh)
    if any(c.placements != first.placements for c in made):
        seen = sorted({str(list(c.placements)) for c in made})
        return _error(where, f"ranks found different placements: {' and '.join(seen)}", shapes, mesh)
    if any(len(c.shape) != len(first.shape) for c in made):
        return _error(where, "ranks hold different numbers of dims", shapes, mesh)
    return None


def settle_alone(one: Claim, mesh: ModelMesh) -> Layout | LayoutError:
    """The layout of rows at experts by this rank's claim alone: other ranks may have none of them to claim with."""
    if one.refusal:
        shapes = [one.shape if rank == mesh.rank else None for rank in mesh.ranks]
        return _error(one.where, one.refusal, shapes, mesh)
    dims = [shard_dim(p) for p in one.placements]
    sizes = [None if d is None or not one.global_shape else one.global_shape[d] for d in dims]
    ragged = tuple(
        d is not None and (i in one.parted or s != one.shape[d] * mesh.axes[i].size)
        for i, (d, s) in enumerate(zip(dims, sizes, strict=True))
    )
    return Layout(one.placements, _evidence(one, mesh), one.shape, ragged, parted=one.parted)


def _evidence(claim: Claim, mesh: ModelMesh) -> str:
    return "; ".join(f"{n}: {s}" for n, s in zip(mesh.names, claim.sources, strict=True))


# -- axis by axis ----------------------------------------------------------------------------------------------
def _check_axis(axis: int, sites: Sequence[_Site], replicas: Sequence[_Site], samples: Tensor, mesh: ModelMesh) -> None:
    """Compare along this rank's line: replicas by their samples, shards by their sizes."""
    here = [i for i, s in enumerate(replicas) if replicates(s.claim.placements[axis])]
    sharded = [s for s in sites if shard_dim(s.claim.placements[axis]) is not None]
    sizes = torch.tensor([s.shape[_dim(s, axis)] for s in sharded], dtype=torch.double, device="cpu")
    if not here and not sharded:
        return
    low, high = extremes(torch.cat([samples[here].flatten(), sizes]), mesh.group(axis))
    split = ROW * len(here)
    _check_replicas(axis, [replicas[i] for i in here], low[:split].view(-1, ROW), high[:split].view(-1, ROW), mesh)
    uneven = (low[split:] != high[split:]).tolist()
    totals = sizes * mesh.axes[axis].size
    if any(uneven):
        totals = sizes.clone()
        dist.all_reduce(totals, group=mesh.group(axis))
    for site, total, ragged in zip(sharded, totals.tolist(), uneven, strict=True):
        _add_up(axis, site, int(total), ragged, mesh)


def _dim(site: _Site, axis: int) -> int:
    dim = shard_dim(site.claim.placements[axis])
    assert dim is not None
    return dim


def _check_replicas(axis: int, sites: Sequence[_Site], low: Tensor, high: Tensor, mesh: ModelMesh) -> None:
    margin = high[:, 1:2].clone()
    differs = (low[:, 0] != high[:, 0]) | ((high - low)[:, 2:] > margin).any(1)
    for site, unequal in zip(sites, differs.tolist(), strict=True):
        if unequal and not site.problem:
            site.problem = f"it should be the same along {mesh.names[axis]!r} and is not"


def _add_up(axis: int, site: _Site, total: int, uneven: bool, mesh: ModelMesh) -> None:
    dim, placements = _dim(site, axis), site.claim.placements
    parted = axis in site.claim.parted
    site.ragged[axis] = uneven or mesh.axes[axis].kind == "data" or parted
    site.shape[dim] = total
    want = site.claim.global_shape[dim]
    if (
        mesh.axes[axis].kind == "tensor"
        and not parted
        and want is not None
        and total != want
        and all(shard_dim(p) != dim for i, p in enumerate(placements) if i != axis)
        and not site.problem
    ):
        site.problem = f"the sizes along {mesh.names[axis]!r} add up to {total} on dim {dim}, not to {want}"


# -- what any rank found ---------------------------------------------------------------------------------------
def _tell(sites: Mapping[Key, _Site], mesh: ModelMesh, found: dict[Key, Layout | LayoutError]) -> None:
    mine = torch.tensor([[bool(s.problem), s.unproven, *s.ragged] for s in sites.values()], dtype=torch.long)
    _, high = extremes(mine.flatten(), mesh.world)
    flags = high.view(len(sites), -1).bool().tolist()
    bad = [key for key, (problem, *_) in zip(sites, flags, strict=True) if problem]
    if bad:
        everyone = all_gather_objects([(sites[k].claim.shape, sites[k].problem) for k in bad], mesh.world)
        for i, key in enumerate(bad):
            problem = next(theirs[i][1] for theirs in everyone if theirs[i][1])
            found[key] = _error(sites[key].claim.where, problem, [theirs[i][0] for theirs in everyone], mesh)
    made: dict[tuple[Any, ...], Layout] = {}  # many sites have the same
    for (key, site), (_, unproven, *ragged) in zip(sites.items(), flags, strict=True):
        if key not in found:
            c = site.claim
            like = (c.placements, c.sources, tuple(site.shape), tuple(ragged), unproven, c.late, c.parted)
            if like not in made:
                placements, _, shape, uneven, _, late, parted = like
                made[like] = Layout(
                    placements, _evidence(c, mesh), shape, uneven, not unproven, late=late, parted=parted
                )
            found[key] = made[like]


def _refused(claim: Claim, who: str, shapes: Sequence[Shape | None], mesh: ModelMesh) -> LayoutError:
    error = _error(claim.where, f"{claim.refusal} ({who})", shapes, mesh)
    error.passing = claim.passing
    return error


def _error(where: str, reason: str, shapes: Sequence[Shape | None], mesh: ModelMesh) -> LayoutError:
    hint = ", ".join(f"{n!r}: Shard(dim) or Replicate()" for n in mesh.names)
    return LayoutError(
        f"{where}: the full value is unknown: {reason}. Local shapes by rank: {_by_rank(mesh.ranks, shapes)}. "
        f"If you know how it lies, pass layout={{{hint}}} to the HookFunction."
    )


def _by_rank(ranks: Sequence[int], shapes: Sequence[Any]) -> str:
    """{rank: shape}, and on many ranks {shape: some of the ranks that hold it}."""
    pairs = [(r, s) for r, s in zip(ranks, shapes, strict=True) if s is not None]
    if len(pairs) <= 8:
        return str(dict(pairs))
    holders: dict[Any, list[int]] = {}
    for rank, shape in pairs:
        holders.setdefault(shape, []).append(rank)
    rows = [
        f"{shape} on ranks {', '.join(map(str, held[:8]))}" + (f" and {len(held) - 8} more" if len(held) > 8 else "")
        for shape, held in holders.items()
    ]
    return "; ".join(rows[:8]) + ("" if len(rows) <= 8 else f"; and {len(rows) - 8} other shapes")
