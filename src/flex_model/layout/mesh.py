"""The mesh of a model: which ranks hold it, along which axes, and the process groups this library talks through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from math import prod
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flex_model.errors import MeshError

__all__ = ["Axis", "AxisKind", "ModelMesh"]

AxisKind = Literal["data", "tensor"]


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis as an engine reports it: ``ranks`` are the global ranks along it through this rank, in order."""

    name: str
    kind: AxisKind
    ranks: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.ranks)


class ModelMesh:
    """All ranks of one model as a grid, one dim an axis, data axes before tensor axes.

    Groups are the library's own, with its own timeout, made when first used; making them is collective.
    """

    def __init__(
        self, axes: Sequence[Axis] = (), grid: Tensor | None = None, *, timeout: timedelta, mean: bool = True
    ) -> None:
        self.axes = tuple(a for a in axes if a.size > 1)
        self.timeout = timeout
        self.mean = mean
        self.rank = dist.get_rank() if self.axes else 0
        self.grid = self._grid(grid)
        where = (self.grid == self.rank).nonzero()
        if len(where) != 1:
            raise MeshError(f"rank {self.rank} is not exactly once in the model's mesh {self.grid.tolist()}.")
        self.coordinate: tuple[int, ...] = tuple(where[0].tolist())
        self.names = tuple(a.name for a in self.axes)
        self.ranks = [int(r) for r in self.grid.flatten().tolist()]
        self._coordinates = list(product(*[range(a.size) for a in self.axes]))
        self._lines: dict[int, list[list[int]]] = {}
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._device_mesh: dict[str, DeviceMesh] = {}

    def _grid(self, grid: Tensor | None) -> Tensor:
        shape = [a.size for a in self.axes]
        if not self.axes:
            return torch.zeros((), dtype=torch.long)
        if grid is None and len(self.axes) == 1:
            grid = torch.tensor(self.axes[0].ranks)
        if grid is None:
            raise MeshError(f"the axes {[a.name for a in self.axes]} are not on one mesh; pass mesh= to FlexModel.")
        return grid.reshape(shape).to(torch.long)

    @property
    def size(self) -> int:
        return prod(a.size for a in self.axes)

    @property
    def main(self) -> int:
        """The global rank that captures are delivered to by default: the lowest."""
        return min(self.ranks)

    @property
    def is_main(self) -> bool:
        return self.rank == self.main

    def index(self, name: str) -> int:
        if name not in self.names:
            raise MeshError(f"the model's mesh has no axis {name!r}; its axes are {list(self.names)}.")
        return self.names.index(name)

    def coordinates(self) -> list[tuple[int, ...]]:
        """The coordinate of every rank, in the order of ``ranks`` (which is the order of group ranks)."""
        return self._coordinates

    def lines(self, axis: int) -> list[list[int]]:
        """Group ranks along an axis, one list for each place on the other axes."""
        if axis not in self._lines:
            grouped: dict[tuple[int, ...], list[int]] = {}
            for rank, c in enumerate(self._coordinates):
                grouped.setdefault(c[:axis] + c[axis + 1 :], []).append(rank)
            self._lines[axis] = list(grouped.values())
        return self._lines[axis]

    # -- groups ------------------------------------------------------------------------------------------------
    def prepare(self) -> None:
        """Make all groups now, in the same order on every rank (collective)."""
        if not self.axes or self._groups:
            return
        lines = {tuple(self.ranks): None}
        for i in range(len(self.axes)):
            rows = self.grid.movedim(i, -1).reshape(-1, self.axes[i].size)
            lines.update({tuple(int(r) for r in row): None for row in rows.tolist()})
        everyone = self.size == dist.get_world_size()
        for ranks in lines:
            # A group that only its members make is named by how many groups they have, which must then agree.
            if everyone or self.rank in ranks:
                group = dist.new_group(
                    list(ranks),
                    timeout=self.timeout,
                    use_local_synchronization=not everyone,
                    group_desc="flex_model",
                    sort_ranks=False,
                )
                if self.rank in ranks:
                    self._groups[ranks] = group

    @property
    def world(self) -> dist.ProcessGroup:
        self.prepare()
        return self._groups[tuple(self.ranks)]

    def group(self, axis: int) -> dist.ProcessGroup:
        self.prepare()
        return self._groups[self.axes[axis].ranks]

    def device_mesh(self, device_type: str) -> DeviceMesh:
        """The whole mesh as torch's DeviceMesh, over the library's own groups."""
        if device_type not in self._device_mesh:
            groups = [self.group(i) for i in range(len(self.axes))]
            self._device_mesh[device_type] = (
                DeviceMesh.from_group(groups[0], device_type, mesh_dim_names=self.names)
                if len(groups) == 1
                else DeviceMesh.from_group(groups, device_type, mesh=self.grid, mesh_dim_names=self.names)
            )
        return self._device_mesh[device_type]

    def axis_mesh(self, axis: int, device_type: str) -> DeviceMesh:
        mesh = self.device_mesh(device_type)
        return mesh if len(self.axes) == 1 else mesh[self.names[axis]]

    def close(self) -> None:
        self._groups.clear()
        self._device_mesh.clear()

    def __repr__(self) -> str:
        return "ModelMesh(" + ", ".join(f"{a.name}={a.size} ({a.kind})" for a in self.axes) + ")"
