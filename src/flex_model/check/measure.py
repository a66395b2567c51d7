"""Statistics of values that lie in shards: each rank measures its own part, and only the measures are added up.

Beside the usual ones there are 64 projections on random signs of the element's place in the whole tensor. They are the
same however the tensor lies, they are linear, and the mean of their squares estimates the squared norm: so the
projections of two tensors tell about how far those are apart (Achlioptas 2003, doi.org/10.1016/S0022-0000(03)00025-4).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, nan, sqrt

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.placement_types import Placement

from flex_model.layout.layout import my_part, on_dim, shard_dim
from flex_model.layout.values import local

__all__ = ["PROJECTIONS", "Statistics", "measure", "measures"]

PROJECTIONS = 64
_SUMS = 5  # elements, their sum, the sum of their squares, how many are nan, how many infinite; then the projections
_CHUNK = 2**24  # elements that are doubled at a time


@dataclass(frozen=True, slots=True)
class Statistics:
    """One whole tensor in a few numbers. ``nan`` and ``inf`` count elements; all else is of the finite ones.

    ``spread``: {axis: how far replicas along it are apart, relative to the norm}, for axes it is replicated over.
    """

    shape: tuple[int, ...]
    dtype: str
    layout: str
    mean: float
    std: float
    norm: float
    low: float
    high: float
    nan: int
    inf: int
    spread: dict[str, float]
    projections: tuple[float, ...]  # 64

    @property
    def finite(self) -> bool:
        return not self.nan and not self.inf


def measure(values: Sequence[Tensor]) -> list[Statistics]:
    """Statistics of whole tensors, from this rank's part of those that are DTensors; collective where there are any.

    >>> one, = measure([torch.tensor([3.0, -4.0, float("nan")])])
    >>> one.norm, one.nan
    (5.0, 1)
    """
    out: list[Statistics | None] = [None] * len(values)
    shards = [i for i, v in enumerate(values) if isinstance(v, DTensor)]
    for i, value in enumerate(values):
        if i not in shards:
            sums, ends = _of_part(value.detach(), [torch.arange(n) for n in value.shape])
            out[i] = _statistics(value, "whole", sums, ends, {})
    for mesh in dict.fromkeys(values[i].device_mesh for i in shards):  # type: ignore[attr-defined]
        mine = [i for i in shards if values[i].device_mesh == mesh]  # type: ignore[attr-defined]
        for i, found in zip(mine, _on_mesh([values[i] for i in mine], mesh), strict=True):  # type: ignore[misc]
            out[i] = found
    return [s for s in out if s is not None]


def measures(part: Tensor) -> Tensor:
    """What one rank's tensor measures, as numbers that equal tensors share."""
    return _of_part(part, [torch.arange(n) for n in part.shape])[0]


# -- this rank's part ------------------------------------------------------------------------------------------
def _of_part(part: Tensor, places: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sums and projections, and (minus the lowest, the highest), of a part whose elements have these places."""
    if part.is_complex():
        part, places = torch.view_as_real(part), [*places, torch.arange(2)]
    places = [p.to(part.device) for p in places]
    sums = torch.zeros(_SUMS + PROJECTIONS, dtype=torch.double, device=part.device)
    ends = torch.full((2,), -inf, dtype=torch.double, device=part.device)
    rows = max(1, _CHUNK * max(1, len(part)) // max(1, part.numel())) if part.dim() else 1
    pieces = zip(part.split(rows), places[0].split(rows), strict=True) if part.dim() else [(part, None)]
    for piece, first in pieces:
        if not piece.numel():
            continue
        x = piece.double()
        finite = x.isfinite()
        kept = torch.where(finite, x, 0.0)
        sums[:_SUMS] += torch.stack(
            [finite.sum().double(), kept.sum(), kept.square().sum(), x.isnan().sum(), x.isinf().sum()]
        )
        sums[_SUMS:] += _project(kept, [] if first is None else [first, *places[1:]])
        if finite.any():
            found = torch.stack([-x[finite].amin(), x[finite].amax()])
            ends = torch.maximum(ends, found)
    return sums, ends


def _project(x: Tensor, places: Sequence[Tensor]) -> Tensor:
    """Dim by dim, the last one first: the sign of an element is the product of its places' signs."""
    if not places:
        return x.expand(PROJECTIONS)
    out = x @ _signs(places[-1], len(places) - 1)  # (..., 64)
    for dim in reversed(range(len(places) - 1)):
        out = (out * _signs(places[dim], dim)).sum(-2)
    return out


def _signs(places: Tensor, dim: int) -> Tensor:
    """64 random signs for each place on a dim: the bits of a hash (splitmix64), the same on every machine."""
    x = places.long() + (dim + 1) * 0x1E3779B97F4A7C15
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    x = x ^ _shifted(x, 31)
    bits = (x.unsqueeze(-1) >> torch.arange(PROJECTIONS, device=x.device)) & 1
    return (bits * 2 - 1).double()


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


# -- the ranks together ----------------------------------------------------------------------------------------
def _on_mesh(values: Sequence[DTensor], mesh: DeviceMesh) -> list[Statistics]:
    """All values of one mesh: their measures travel together, by what has to be added up along which axes."""
    parts = [_whole_elements(v, mesh) for v in values]
    tables = _tables(values, parts, mesh)
    device = torch.device(mesh.device_type)
    pairs = [_of_part(p, _places(v, mesh, t)) for v, p, t in zip(values, parts, tables, strict=True)]
    sums = [s.to(device) for s, _ in pairs]
    ends = [e.to(device) for _, e in pairs]
    kinds = [tuple(shard_dim(p) is not None for p in v.placements) for v in values]
    spreads: list[dict[str, float]] = [{} for _ in values]
    for kind in sorted(set(kinds)):
        mine = [i for i, k in enumerate(kinds) if k == kind]
        along = [i for i, sharded in enumerate(kind) if sharded]
        total = _reduced(torch.stack([sums[i] for i in mine]), mesh, "sum", along)
        extreme = _reduced(torch.stack([ends[i] for i in mine]), mesh, "max", along)
        for axis in (a for a in range(mesh.ndim) if a not in along):
            far = _apart(total, mesh, axis)
            name = mesh.mesh_dim_names[axis] if mesh.mesh_dim_names else str(axis)
            for i, one in zip(mine, far, strict=True):
                spreads[i][name] = one
        others = [a for a in range(mesh.ndim) if a not in along]
        total[:, 3:_SUMS] = _reduced(total[:, 3:_SUMS].contiguous(), mesh, "max", others)  # on any replica
        for i, s, e in zip(mine, total, extreme, strict=True):
            sums[i], ends[i] = s, e
    names = mesh.mesh_dim_names or tuple(map(str, range(mesh.ndim)))
    return [
        _statistics(v, ", ".join(f"{n}: {p}" for n, p in zip(names, v.placements, strict=True)), s, e, far)
        for v, s, e, far in zip(values, sums, ends, spreads, strict=True)
    ]


def _reduced(local_part: Tensor, mesh: DeviceMesh, op: str, axes: Iterable[int]) -> Tensor:
    """Summed, or the highest, along some axes: an all-reduce that DTensor makes of it."""
    axes = set(axes)
    placements = [Partial(op) if i in axes else Replicate() for i in range(mesh.ndim)]
    whole = DTensor.from_local(local_part, mesh, placements, run_check=False)
    return local(whole.redistribute(placements=[Replicate()] * mesh.ndim))


def _apart(total: Tensor, mesh: DeviceMesh, axis: int) -> list[float]:
    """How far the replicas of each row are apart along an axis, relative to the norm."""
    row = torch.cat([total[:, 1:3], total[:, _SUMS:]], 1)
    high, low = _reduced(torch.cat([row, -row]), mesh, "max", [axis]).chunk(2)
    norm = torch.maximum(high[:, 1].sqrt(), torch.tensor(1e-300, dtype=torch.double))
    apart = (high + low)[:, 2:].amax(1) / norm
    return [float(x) for x in apart]


def _whole_elements(value: DTensor, mesh: DeviceMesh) -> Tensor:
    """This rank's part with sums completed: of a value in partial sums every element is on several ranks."""
    part = local(value)
    if not any(isinstance(p, Partial) for p in value.placements):
        return part
    partial: list[Placement] = [p if isinstance(p, Partial) else Replicate() for p in value.placements]
    sums = DTensor.from_local(part.to(mesh.device_type), mesh, partial, run_check=False)
    return local(sums.redistribute(placements=[Replicate()] * mesh.ndim))


def _tables(values: Sequence[DTensor], parts: Sequence[Tensor], mesh: DeviceMesh) -> list[Tensor | None]:
    """For values in parts of unequal size, the shapes of all ranks' parts: (*mesh, dims). None: parts are even."""
    uneven = torch.tensor([_is_uneven(v, p) for v, p in zip(values, parts, strict=True)], dtype=torch.long)
    everywhere = range(mesh.ndim)
    flags = _reduced(uneven.to(mesh.device_type), mesh, "max", everywhere).tolist()
    tables: list[Tensor | None] = []
    for flag, part in zip(flags, parts, strict=True):
        if not flag:
            tables.append(None)
            continue
        table = torch.zeros(*mesh.mesh.shape, part.dim(), dtype=torch.long)
        table[tuple(mesh.get_coordinate() or ())] = torch.tensor(part.shape)
        tables.append(_reduced(table.to(mesh.device_type), mesh, "sum", everywhere).cpu())
    return tables


def _is_uneven(value: DTensor, part: Tensor) -> bool:
    ranks = [1] * value.dim()
    for axis, placement in enumerate(value.placements):
        dim = shard_dim(placement)
        if dim is not None:
            ranks[dim] *= value.device_mesh.size(axis)
    return tuple(part.shape) != tuple(s / r for s, r in zip(value.shape, ranks, strict=True))


def _places(value: DTensor, mesh: DeviceMesh, table: Tensor | None) -> list[Tensor]:
    """Where in the whole tensor this rank's elements are, dim by dim."""
    coordinate = list(mesh.get_coordinate() or ())
    places = []
    for dim, size in enumerate(value.shape):
        place = torch.arange(size)
        for axis, placement in enumerate(value.placements):
            if shard_dim(placement) == dim:
                sizes = _sizes(value, mesh, table, axis, dim, len(place))
                place = my_part(place, on_dim(placement, 0), sizes, coordinate[axis])
        places.append(place)
    return places


def _sizes(value: DTensor, mesh: DeviceMesh, table: Tensor | None, axis: int, dim: int, size: int) -> list[int]:
    """Of what ``size`` elements of a dim are left by the axes before, how many each rank of ``axis`` has."""
    ranks = mesh.size(axis)
    if table is None:
        return [size // ranks] * ranks
    sizes = table[..., dim]
    for other in reversed(range(mesh.ndim)):
        if other > axis and shard_dim(value.placements[other]) == dim:
            sizes = sizes.sum(other)
        elif other != axis:
            sizes = sizes.select(other, (mesh.get_coordinate() or [])[other])
    return [int(s) for s in sizes.tolist()]


def _statistics(value: Tensor, layout: str, sums: Tensor, ends: Tensor, spread: dict[str, float]) -> Statistics:
    count, total, squares, nans, infs = sums[:_SUMS].tolist()
    low, high = (-ends[0]).item(), ends[1].item()
    mean = total / count if count else nan
    return Statistics(
        shape=tuple(value.shape),
        dtype=str(value.dtype).removeprefix("torch."),
        layout=layout,
        mean=mean,
        std=sqrt(max(0.0, squares / count - mean * mean)) if count else nan,
        norm=sqrt(squares),
        low=low if count else nan,
        high=high if count else nan,
        nan=int(nans),
        inf=int(infs),
        spread=spread,
        projections=tuple(sums[_SUMS:].tolist()),
    )
