"""The route of ``run="one_rank"``: parts to the main rank, the edit once, the parts of its result back.

On the other ranks an empty tensor stands in for the full one, so that the backward runs the same exchanges there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Replicate

from flex_model.errors import LayoutError
from flex_model.layout.layout import Layout
from flex_model.layout.mesh import ModelMesh
from flex_model.routing.assembly import Parts, Shapes, assemble, owners, owns, part_of
from flex_model.routing.delivery import exchange_shapes

__all__ = ["OneRankRoute", "use_parameters"]


class OneRankRoute:
    """Unshard to the main rank and back, for one value at one call."""

    def __init__(self, mesh: ModelMesh, layout: Layout, local: Tensor) -> None:
        self.mesh, self.layout = mesh, layout
        mine = tuple(local.shape)
        self.shapes = exchange_shapes([mine], mesh)[0] if any(layout.ragged) else Shapes([mine], mesh.size)
        self.me, self.main = mesh.me, mesh.group_rank(mesh.home)
        self.here = self.me == self.main

    def unshard(self, local: Tensor) -> Tensor:
        out: Tensor = _ToMain.apply(local, self)
        return out

    def reshard(self, full: Tensor, like: Tensor) -> Tensor:
        out: Tensor = _FromMain.apply(full, like.dtype, self)
        return out

    def collect(self, local: Tensor) -> Tensor:
        """The full tensor on main, an empty one elsewhere."""
        group = self.mesh.world
        if not self.here:
            if owns(self.mesh, self.layout) and local.numel():
                dist.send(local.detach().contiguous(), group=group, group_dst=self.main)
            return local.new_empty(0)
        parts = {self.me: local}
        for rank in owners(self.mesh, self.layout):
            if rank != self.me:
                parts[rank] = local.new_empty(self.shapes[rank])
                if parts[rank].numel():
                    dist.recv(parts[rank], group=group, group_src=rank)
        full = assemble(parts, self.layout, self.mesh)
        if isinstance(full, Parts):
            raise LayoutError(
                f"run='one_rank': the ranks' shapes {list(self.shapes)} make no rectangle, so rank {self.mesh.main} "
                f"cannot edit them together; use run='every_rank'.",
                page="no-rectangle",
            )
        return full

    def spread(self, full: Tensor, dtype: torch.dtype) -> Tensor:
        """Each rank's part of main's full tensor."""
        group, shape = self.mesh.world, self.shapes[self.me]
        if not self.here:
            local = torch.empty(shape, dtype=dtype, device=full.device)
            if local.numel():
                dist.recv(local, group=group, group_src=self.main)
            return local
        for rank in range(self.mesh.size):
            part = part_of(full, self.layout, self.mesh, self.shapes, rank).contiguous()
            if rank != self.me and part.numel():
                dist.send(part, group=group, group_dst=rank)
        return part_of(full, self.layout, self.mesh, self.shapes, self.me).contiguous().clone()

    def mean_replicas(self, grad: Tensor) -> Tensor:
        """On data axes that hold replicas, each rank has the gradient of its own loss: their mean is the oracle's."""
        for i, placement in enumerate(self.layout.placements):
            if isinstance(placement, Replicate) and self.mesh.axes[i].kind == "data" and self.mesh.mean:
                grad = grad.contiguous().clone()
                dist.all_reduce(grad, group=self.mesh.group(i))
                grad /= self.mesh.axes[i].size
        return grad


class _ToMain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, route: OneRankRoute) -> Tensor:
        ctx.route = route
        full = route.collect(local)
        return full.view_as(full) if full is local else full

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.route.spread(grad, grad.dtype), None


class _FromMain(torch.autograd.Function):
    """A recomputation ends once what was saved is there again. Main saves more than the others, who run no edit: what
    is saved here, after the exchange, brings every rank's recomputation to it, and none ends within it."""

    @staticmethod
    def forward(ctx: Any, full: Tensor, dtype: torch.dtype, route: OneRankRoute) -> Tensor:
        ctx.route = route
        out = route.spread(full, dtype)
        ctx.save_for_backward(out.new_empty(0))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        _ = ctx.saved_tensors  # the recomputation begins here on every rank, if it has not yet
        route: OneRankRoute = ctx.route
        return route.collect(route.mean_replicas(grad)), None, None


class _UseParameters(torch.autograd.Function):
    """Parameters as they are; their gradients are summed over the ranks, of which only main has any."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(p.view_as(p) for p in parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out = []
        for grad in grads:
            grad = grad.contiguous().clone()
            dist.all_reduce(grad, group=ctx.group)
            out.append(grad)
        return (None, *out)


class _Tie(torch.autograd.Function):
    """The first tensor; the others get a zero gradient from it, so that their backward runs on this rank too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.shapes = [(o.shape, o.dtype, o.device) for o in others]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros(s, dtype=d, device=v) for s, d, v in ctx.shapes)


def tie(x: Tensor, *others: Tensor) -> Tensor:
    """``x`` with a zero gradient to ``others``."""
    out: Tensor = _Tie.apply(x, *others)
    return out


def use_parameters(mesh: ModelMesh, parameters: list[Tensor]) -> list[Tensor]:
    """The parameters for use in an edit that only main runs."""
    return list(_UseParameters.apply(mesh.world, *parameters)) if parameters else []
