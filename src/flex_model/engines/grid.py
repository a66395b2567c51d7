"""The grid that the axes of several engines make together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flex_model.engines.engine import axes_of_mesh
from flex_model.layout.mesh import Axis

__all__ = ["beside", "named_apart", "on_grid"]


def named_apart(axis: Axis, others: Sequence[Axis]) -> Axis:
    name, count = axis.name, 1
    while any(name == o.name for o in others):
        count += 1
        name = f"{axis.name}_{count}"
    return replace(axis, name=name)


def beside(axis: Axis, others: Sequence[Axis]) -> Axis:
    """What is left of an axis that lies over one of the sequence: data engines flatten the two into one."""
    for other in others:
        if other.sequence and axis.kind == "data" and axis.size > other.size and set(other.ranks) <= set(axis.ranks):
            flat = torch.tensor(axis.ranks)
            for lines in (flat.view(-1, other.size), flat.view(other.size, -1).T):
                if list(other.ranks) in lines.tolist():
                    place = other.ranks.index(dist.get_rank())
                    return replace(axis, ranks=tuple(lines[:, place].tolist()))
    return axis


def on_grid(axes: list[Axis], meshes: Sequence[DeviceMesh]) -> tuple[list[Axis], Tensor | None]:
    """The axes, and the ranks of all of them as one grid, from a root mesh that has a dim for each."""
    axes = [a for a in axes if a.size > 1]
    if len(axes) < 2:
        return axes, None
    for mesh in meshes:
        root = mesh._get_root_mesh()
        for candidate in (mesh, root):
            grid = _sub_grid(candidate, axes)
            if grid is not None:
                return axes, grid
    return axes, _exchanged_grid(axes)


def _sub_grid(mesh: DeviceMesh, axes: Sequence[Axis]) -> Tensor | None:
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    lines = [a.ranks for a in axes_of_mesh(mesh, "tensor", "axis")]
    if any(a.ranks not in lines for a in axes):
        return None
    dims = [lines.index(a.ranks) for a in axes]
    if len(set(dims)) != len(dims):
        return None
    fixed = tuple(slice(None) if d in dims else c for d, c in enumerate(coordinate))
    kept = [d for d in range(mesh.ndim) if d in dims]
    return mesh.mesh[fixed].permute([kept.index(d) for d in dims])


def _exchanged_grid(axes: Sequence[Axis]) -> Tensor | None:
    """For axes of unrelated groups: every rank tells its lines, and the grid is followed from this rank on."""
    lines: list[list[tuple[int, ...]] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(lines, [a.ranks for a in axes])

    def follow(rank: int, axis: int) -> Tensor:
        if axis == len(axes):
            return torch.tensor(rank)
        mine = lines[rank]
        assert mine is not None
        return torch.stack([follow(r, axis + 1) for r in mine[axis]])

    return follow(dist.get_rank(), 0)
