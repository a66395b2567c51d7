"""Parameters that should be the same on several ranks: compared by the lowest and highest of their measures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate

from flex_model.check.measure import measures
from flex_model.check.report import Row
from flex_model.layout.mesh import ModelMesh
from flex_model.layout.values import local, sharding
from flex_model.routing.collectives import extremes

if TYPE_CHECKING:
    from flex_model.core.runtime import Runtime

__all__ = ["parameter_rows", "trainable_rows"]

_ADVICE = "broadcast it from one rank, and find what changed it on one alone (an update, a seed, a load)"


def parameter_rows(runtime: Runtime) -> list[Row]:
    """One row a parameter that differs between ranks that should have the same, or one that says none does."""
    mesh = runtime.mesh
    if not mesh.axes:
        return [Row("parameters equal", "ok", "", "one process")]
    mesh.prepare()
    named = list(_parameters(runtime))
    rows = []
    for axis in range(len(mesh.axes)):
        mine = [(name, p) for name, p, axes in named if axis in axes]
        rows += _compared("parameters equal", mine, axis, mesh)
    return rows


def trainable_rows(runtime: Runtime) -> list[Row]:
    """The same of trainable modules, which every rank has whole."""
    mesh = runtime.whole
    named = [(n, p) for n, p in runtime.modules.named_parameters() if sharding(p) is None or _is_whole(p)]
    if not named or not mesh.axes:
        return []
    mesh.prepare()
    return [row for axis in range(len(mesh.axes)) for row in _compared("trainable modules equal", named, axis, mesh)]


def _is_whole(parameter: Tensor) -> bool:
    return all(isinstance(p, Replicate) for p in sharding(parameter).placements)


def _parameters(runtime: Runtime) -> Iterator[tuple[str, nn.Parameter, set[int]]]:
    """What this rank holds, once each, with the axes along which every rank should hold the same of it."""
    hidden = {(id(owner), name): holder for owner, name, holder in runtime.engines.hidden_parameters()}
    seen = set()
    for name, (owner, attribute) in runtime.names.parameters.items():
        parameter = hidden.get((id(owner), attribute), owner._parameters.get(attribute))
        if parameter is not None and not parameter.is_meta and id(parameter) not in seen:
            seen.add(id(parameter))
            lines = [set(line) for line in runtime.engines.parted(owner, attribute)]
            axes = enumerate(runtime.mesh.axes)
            yield name, parameter, {i for i, a in axes if all(len(line & set(a.ranks)) < 2 for line in lines)}


def _compared(check: str, named: list[tuple[str, nn.Parameter]], axis: int, mesh: ModelMesh) -> list[Row]:
    """Compare along this rank's line, and tell all ranks. Collective."""
    name = mesh.names[axis]
    apart = torch.zeros(len(named), dtype=torch.double)
    if named:
        mine = torch.stack([measures(local(p)).cpu() for _, p in named])
        low, high = extremes(mine, mesh.group(axis))
        norm = high[:, 2].clamp_min(1e-300).sqrt()
        apart = (high - low)[:, 1:].div(norm.unsqueeze(1)).amax(1)
        apart[(high - low)[:, 3:5].amax(1) > 0] = float("inf")
    _, worst = extremes(apart, mesh.world) if named else (apart, apart)
    bad = [(n, float(w)) for (n, _), w in zip(named, worst, strict=True) if w > 0]
    if not bad:
        return [Row(check, "ok", f"along {name}", f"{len(named)} parameters" if named else "none is replicated there")]
    return [Row(check, "fail", n, f"ranks along {name!r} differ by {w:.1e} of its norm", _ADVICE) for n, w in bad]
