"""The mesh of a model: which ranks hold it, along which axes, and the process groups this library talks through."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from math import prod
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flex_model.errors import MeshError

__all__ = ["Axis", "AxisKind", "ModelMesh"]

AxisKind = Literal["data", "tensor", "stage"]
# Groups whose ranks are in the order of the mesh; before torch 2.13, torch sorts them.
_IN_ORDER = {"sort_ranks": False} if "sort_ranks" in inspect.signature(dist.new_group).parameters else {}


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis as an engine reports it: ``ranks`` are the global ranks along it through this rank, in order.

    ``sequence``: a data axis whose ranks hold parts of the sequence, not of the batch (context parallelism).
    """

    name: str
    kind: AxisKind
    ranks: tuple[int, ...]
    sequence: bool = False
    size: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", len(self.ranks))


class ModelMesh:
    """All ranks of one model as a grid, one dim an axis.

    Groups are the library's own, with its own timeout, made when first used; making them is collective. Layouts are
    over the ranks that hold one pipeline stage: ``one_stage()`` is their mesh, which shares the groups of the whole.
    """

    def __init__(
        self,
        axes: Sequence[Axis] = (),
        grid: Tensor | None = None,
        *,
        timeout: timedelta,
        mean: bool = True,
        whole: ModelMesh | None = None,
    ) -> None:
        self.axes = tuple(a for a in axes if a.size > 1)
        self.timeout = timeout
        self.mean = mean
        self.rank = dist.get_rank() if self.axes or whole is not None else 0
        self.grid = self._grid(grid)
        where = (self.grid == self.rank).nonzero()
        if len(where) != 1:
            raise MeshError(
                f"rank {self.rank} is not exactly once in the model's mesh {self.grid.tolist()}; "
                f"pass a mesh= that has every rank once.",
                page="axes-on-no-mesh",
            )
        self.coordinate: tuple[int, ...] = tuple(where[0].tolist())
        self.names = tuple(a.name for a in self.axes)
        self.ranks = [int(r) for r in self.grid.flatten().tolist()]
        self._whole = whole  # of which this is one stage
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = whole._groups if whole is not None else {}
        self._channel: dist.ProcessGroup | None = None
        self._control: dist.ProcessGroup | None = None
        self._device_mesh: dict[str, DeviceMesh] = {}
        self._parts: list[ModelMesh] = []  # the meshes of single stages
        self._generation = 0  # how often the groups were left behind

    def _grid(self, grid: Tensor | None) -> Tensor:
        shape = [a.size for a in self.axes]
        if not self.axes:
            return torch.tensor(self.rank)
        if grid is None and len(self.axes) == 1:
            grid = torch.tensor(self.axes[0].ranks)
        if grid is None:
            raise MeshError(
                f"the axes {[a.name for a in self.axes]} are not on one mesh; pass mesh= to FlexModel.",
                page="axes-on-no-mesh",
            )
        return grid.reshape(shape).to(torch.long)

    @cached_property
    def size(self) -> int:
        return prod(a.size for a in self.axes)

    @cached_property
    def main(self) -> int:
        """The global rank that captures go to by default: the lowest; of a stage, the one in line with that."""
        if self._whole is None:
            return min(self.ranks)
        axis = self._whole.stage_axis
        assert axis is not None
        home = (self._whole.grid == self._whole.main).nonzero()[0].tolist()
        return int(self.grid[tuple(home[:axis] + home[axis + 1 :])])

    @property
    def stage_axis(self) -> int | None:
        """The index of the axis that pipeline stages lie along."""
        return next((i for i, a in enumerate(self.axes) if a.kind == "stage"), None)

    @property
    def stage(self) -> int:
        """This rank's place along the stage axis."""
        axis = self.stage_axis
        return 0 if axis is None else self.coordinate[axis]

    def one_stage(self) -> ModelMesh:
        """The mesh of the ranks that hold what this rank holds a part of: this mesh without its stage axis."""
        axis = self.stage_axis
        if axis is None:
            return self
        axes = [a for i, a in enumerate(self.axes) if i != axis]
        grid = self.grid.select(axis, self.coordinate[axis])
        self._parts.append(ModelMesh(axes, grid, timeout=self.timeout, mean=self.mean, whole=self))
        return self._parts[-1]

    @property
    def is_main(self) -> bool:
        return self.rank == self.main

    def index(self, name: str) -> int:
        if name not in self.names:
            raise MeshError(
                f"the model's mesh has no axis {name!r}; its axes are {list(self.names)}.", page="axis-unknown"
            )
        return self.names.index(name)

    @cached_property
    def me(self) -> int:
        """This rank's place in ``ranks``, its group rank."""
        return self.group_rank(self.coordinate)

    @cached_property
    def home(self) -> tuple[int, ...]:
        """The coordinate of the main rank."""
        return self.coordinate_of(self.ranks.index(self.main))

    def group_rank(self, coordinate: Sequence[int]) -> int:
        """The place in ``ranks`` of a coordinate: counted, not looked up, so that nothing is kept for each rank."""
        rank = 0
        for place, axis in zip(coordinate, self.axes, strict=True):
            rank = rank * axis.size + place
        return rank

    def coordinate_of(self, group_rank: int) -> tuple[int, ...]:
        places = []
        for axis in reversed(self.axes):
            group_rank, place = divmod(group_rank, axis.size)
            places.append(place)
        return tuple(reversed(places))

    def line(self, axis: int) -> list[int]:
        """Group ranks along an axis through this rank."""
        before, after = self.coordinate[:axis], self.coordinate[axis + 1 :]
        return [self.group_rank((*before, i, *after)) for i in range(self.axes[axis].size)]

    # -- groups ------------------------------------------------------------------------------------------------
    def prepare(self) -> None:
        """Make all groups now, in the same order on every rank (collective)."""
        if self._whole is not None:
            self._whole.prepare()
            return
        if not self.axes or self._groups:
            return
        self._make_group(tuple(self.ranks))
        backend = "fake" if dist.get_backend() == "fake" else "gloo"
        self._control = dist.new_group(self.ranks, **{**self._keywords("control"), "backend": backend})
        if self.stage_axis is not None and len(self.axes) > 2:  # of two axes, a stage is a line
            for stage in self.grid.unbind(self.stage_axis):
                self._make_group(tuple(stage.flatten().tolist()))
        for i in range(len(self.axes)) if len(self.axes) > 1 else ():
            for row in self.grid.movedim(i, -1).reshape(-1, self.axes[i].size):
                self._make_group(tuple(row.tolist()))

    def _make_group(self, ranks: tuple[int, ...]) -> None:
        # A group that only its members make is named by how many groups they have, which must then agree.
        if self._everyone or self.rank in ranks:
            if not _IN_ORDER and list(ranks) != sorted(ranks):
                raise MeshError(
                    f"the model's mesh has ranks {list(ranks)} along an axis or in all, and torch {torch.__version__} "
                    f"makes groups of ranks in rising order only; use a newer torch, or a mesh= whose ranks rise.",
                    page="axes-on-no-mesh",
                )
            group = dist.new_group(list(ranks), **self._keywords(""))
            if self.rank in ranks:
                self._groups[ranks] = group

    @property
    def _everyone(self) -> bool:
        return self.size == dist.get_world_size()

    def _keywords(self, what: str) -> dict[str, Any]:
        return {
            "timeout": self.timeout,
            "use_local_synchronization": not self._everyone,
            "group_desc": f"flex_model {what}".rstrip(),
            "backend": _with_host_memory(dist.get_backend_config()),
            **_IN_ORDER,
        }

    @property
    def world(self) -> dist.ProcessGroup:
        self.prepare()
        return self._groups[tuple(self.ranks)]

    @property
    def control(self) -> dist.ProcessGroup:
        """All ranks again, for small numbers in host memory: no device waits for them."""
        self.prepare()
        group = self._control if self._whole is None else self._whole._control
        assert group is not None
        return group

    def group(self, axis: int) -> dist.ProcessGroup:
        self.prepare()
        return self._groups[self.axes[axis].ranks]

    def channel(self) -> dist.ProcessGroup:
        """A group along the stage axis for messages in host memory, in the middle of forwards. Collective at first."""
        axis = self.stage_axis
        assert axis is not None
        if self._channel is None:
            lines = self.grid.movedim(axis, -1).reshape(-1, self.axes[axis].size).tolist()
            for line in lines:
                group = dist.new_group(line, timeout=self.timeout, backend="gloo", group_desc="flex_model messages")
                if self.rank in line:
                    self._channel = group
        assert self._channel is not None
        return self._channel

    def device_mesh(self, device_type: str) -> DeviceMesh:
        """The whole mesh as torch's DeviceMesh, over the library's own groups."""
        if device_type not in self._device_mesh:
            groups = [self.group(i) for i in range(len(self.axes))]
            # torch takes meshes of the same names for one another, and would find groups that are gone
            again = f".{self._generation}" if self._generation else ""
            names = tuple(name + again for name in self.names)
            self._device_mesh[device_type] = (
                DeviceMesh.from_group(groups[0], device_type, mesh_dim_names=names)
                if len(groups) == 1
                else DeviceMesh.from_group(groups, device_type, mesh=self.grid, mesh_dim_names=names)
            )
        return self._device_mesh[device_type]

    def axis_mesh(self, axis: int, device_type: str) -> DeviceMesh:
        mesh = self.device_mesh(device_type)
        return mesh if len(self.axes) == 1 else mesh[(mesh.mesh_dim_names or self.names)[axis]]

    def leave(self) -> None:
        """Drop all groups, which closes this rank's connections; the next use makes new ones, on every rank."""
        groups = [*self._groups.values(), *(g for g in (self._control, self._channel) if g is not None)]
        self._groups.clear()
        self._channel = self._control = None
        for mesh in (self, *self._parts):
            for device_mesh in mesh._device_mesh.values():
                getattr(device_mesh, "_pg_registry", {}).clear()  # torch keeps meshes in caches
            mesh._device_mesh.clear()
            mesh._generation += 1
        closing = [threading.Thread(target=_close, args=([g],), daemon=True) for g in groups]
        del groups
        for thread in closing:  # one that still waits in a collective of its own ends when the others leave
            thread.start()
        for thread in closing:
            thread.join(0.5)

    def __repr__(self) -> str:
        return "ModelMesh(" + ", ".join(f"{a.name}={a.size} ({a.kind})" for a in self.axes) + ")"


def _with_host_memory(backends: str) -> str | None:
    """For groups of the library's own: the user's backends, and one for small numbers in host memory.

    >>> _with_host_memory("cuda:nccl"), _with_host_memory("cpu:gloo,cuda:nccl")
    ('cpu:gloo,cuda:nccl', None)
    """
    devices = [part.partition(":")[0] for part in backends.split(",")]
    return None if "cpu" in devices else f"cpu:gloo,{backends}"


def _abort(group: dist.ProcessGroup) -> None:
    if "nccl" in dist.get_backend_config(group):
        group.abort()


def _close(held: list[dist.ProcessGroup]) -> None:
    for end in (_abort, dist.destroy_process_group):
        with suppress(Exception):  # it may be half gone
            end(held[0])
    held.clear()
