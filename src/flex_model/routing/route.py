"""``Route``: the differentiable pair ``unshard`` (local to full) and ``reshard`` (full to local) of one layout.

Between the two, gradients are those of the single-process model. On tensor axes that is an all-gather whose backward
is a slice, with a slice whose backward is an all-gather; where an engine means gradients over a data axis, the same
scaled by the world and its inverse. Even tensor axes go through DTensor's ``redistribute``; what it cannot do (uneven
and strided shards, data axes) goes through ``_Gather`` and ``_Split``. Kinds are never mixed within one site.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.placement_types import Placement

from flex_model.layout.layout import Layout, fits, merge_parts, my_part, shard_dim, split_factor
from flex_model.layout.mesh import ModelMesh
from flex_model.routing.collectives import all_gather_ints, all_gather_parts

__all__ = ["Route", "gradient_scale", "scale_gradient", "with_part_of_gradient", "with_whole_gradient"]


class _Gather(torch.autograd.Function):
    """Parts to whole along one axis; the backward takes this rank's part of the gradient."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, step: _Step) -> Tensor:
        ctx.step = step
        return merge_parts(all_gather_parts(local, step.shapes, step.group), step.placement)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        step: _Step = ctx.step
        return (grad if isinstance(step.placement, Partial) else step.take(grad)), None


class _Split(torch.autograd.Function):
    """Whole to this rank's part along one axis; the backward gathers the gradient's parts."""

    @staticmethod
    def forward(ctx: Any, full: Tensor, step: _Step) -> Tensor:
        ctx.step = step
        part = step.take(full)
        return part.view_as(part) if part is full else part.contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        step: _Step = ctx.step
        if isinstance(step.placement, Partial):
            return grad, None
        return merge_parts(all_gather_parts(grad, step.shapes, step.group), step.placement), None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """``x`` as it is, with its gradient times ``factor``."""
    if factor == 1:
        return x
    out: Tensor = _ScaleGradient.apply(x, factor)
    return out


@dataclass(frozen=True, slots=True)
class _Step:
    """One axis of a route at one call: everybody's shapes along it."""

    axis: int
    placement: Placement
    shapes: list[tuple[int, ...]]
    index: int
    group: dist.ProcessGroup
    native: bool  # DTensor's redistribute can do it

    def take(self, full: Tensor) -> Tensor:
        dim = shard_dim(self.placement)
        sizes = [1] * len(self.shapes) if dim is None else [s[dim] for s in self.shapes]
        return my_part(full, self.placement, sizes, self.index)


def gradient_scale(mesh: ModelMesh, layout: Layout, axes: Sequence[int]) -> float:
    """By how much a local gradient exceeds its share of the oracle's: the data axes an engine means over."""
    world = 1
    for i in axes:
        if mesh.mean and mesh.axes[i].kind == "data" and shard_dim(layout.placements[i]) is not None:
            world *= mesh.axes[i].size
    return float(world)


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def with_whole_gradient(x: Tensor, mesh: ModelMesh, layout: Layout) -> Tensor:
    """A replica as it is; its gradient is summed where ranks meet parts of it."""
    for axis in layout.late if torch.is_grad_enabled() else ():
        x = _SumGradient.apply(x, mesh.group(axis))
    return x


def with_part_of_gradient(x: Tensor, mesh: ModelMesh, layout: Layout) -> Tensor:
    """The other end of ``with_whole_gradient``: parts again, that make up the sum together."""
    return scale_gradient(x, 1 / prod(mesh.axes[axis].size for axis in layout.late))


class Route:
    """The way of one value at one call. ``even_axes`` are known to hold equal shapes, so that nothing is asked.

    ``own_part`` names axes that stay local: their ranks' shapes make no rectangle, or rows are parts by nature.
    """

    def __init__(
        self,
        mesh: ModelMesh,
        layout: Layout,
        local: Tensor,
        *,
        axes: Sequence[int] | None = None,
        even_axes: frozenset[int] = frozenset(),
    ) -> None:
        self.mesh, self.layout = mesh, layout
        wanted = [i for i in layout.moving_axes if axes is None or i in axes]
        self.own_part: list[int] = [i for i in wanted if i in layout.parted]
        self._steps: list[_Step] = []  # innermost axis first
        shape = tuple(local.shape)
        for axis in reversed([i for i in wanted if i not in layout.parted]):
            step = self._step(axis, shape, local, even_axes)
            if step is None:
                self.own_part.append(axis)
                continue
            self._steps.append(step)
            dim = shard_dim(step.placement)
            if dim is not None:
                shape = (*shape[:dim], sum(s[dim] for s in step.shapes), *shape[dim + 1 :])
        self.full_shape = shape
        self.scale = gradient_scale(mesh, layout, [s.axis for s in self._steps])

    def _step(self, axis: int, shape: tuple[int, ...], local: Tensor, even_axes: frozenset[int]) -> _Step | None:
        placement, group = self.layout.placements[axis], self.mesh.group(axis)
        size, dim = self.mesh.axes[axis].size, shard_dim(placement)
        ragged = bool(self.layout.ragged) and self.layout.ragged[axis] and axis not in even_axes
        shapes = [shape] * size
        if ragged and dim is not None:
            shapes = [tuple(row) for row in all_gather_ints(shape, group)]
            if not fits(placement, shapes):
                return None
        native = (
            self.mesh.axes[axis].kind == "tensor"
            and split_factor(placement) == 1
            and (dim is None or len({s[dim] for s in shapes}) == 1)
            and not isinstance(placement, Partial)
        )
        return _Step(axis, placement, shapes, self.mesh.coordinate[axis], group, native)

    @property
    def trivial(self) -> bool:
        """Whether the local value is the full one."""
        return not self._steps

    def unshard(self, local: Tensor) -> Tensor:
        """The full tensor; its gradient is the oracle's."""
        full = scale_gradient(local, self.scale)
        for step in self._steps:
            if step.native:
                mesh = self.mesh.axis_mesh(step.axis, local.device.type)
                sharded = DTensor.from_local(full, mesh, [step.placement], run_check=False)
                full = sharded.redistribute(placements=[Replicate()]).to_local()
            else:
                full = _Gather.apply(full, step)
        return full

    def reshard(self, full: Tensor) -> Tensor:
        """This rank's part of an edited full tensor."""
        local = full
        for step in reversed(self._steps):
            if step.native:
                mesh = self.mesh.axis_mesh(step.axis, full.device.type)
                whole = DTensor.from_local(local, mesh, [Replicate()], run_check=False)
                local = whole.redistribute(placements=[step.placement]).to_local()
            else:
                local = _Split.apply(local, step)
        return scale_gradient(local, 1 / self.scale)
