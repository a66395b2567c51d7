"""Trainable modules: used inside edits, owned by FlexModel, their gradients complete and equal on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from flex_model.errors import EditError
from flex_model.layout.mesh import ModelMesh
from flex_model.routing.collectives import all_gather_ints

__all__ = ["TrainableModules"]


def _slots(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where each distinct parameter sits; a shared one at its first place only."""
    seen: set[int] = set()
    out = []
    for owner in module.modules():
        for name, value in owner._parameters.items():
            if value is not None and id(value) not in seen:
                seen.add(id(value))
                out.append((owner, name))
    return out


class TrainableModules(nn.ModuleDict):
    """``modules`` of an editing function. Under DTensor engines parameters are replicated DTensors outside of edits,
    so that clipping and fused optimizers take them together with the model's, and plain tensors inside."""

    def __init__(self) -> None:
        super().__init__()
        self._aside: dict[int, Tensor] = {}  # gradients by slot
        self.spread = False  # whether parameters are DTensors outside of edits, be it on one rank

    def on_mesh(self, mesh: DeviceMesh) -> None:
        """Make every plain parameter a replicated DTensor on ``mesh``."""
        self.spread = True
        for owner, name in _slots(self):
            value = owner._parameters[name]
            assert value is not None
            if not isinstance(value, DTensor):
                local = DTensor.from_local(value.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False)
                owner._parameters[name] = nn.Parameter(local, requires_grad=value.requires_grad)

    def trainable_tensors(self) -> list[Tensor]:
        return [_plain(owner._parameters[name]) for owner, name in _slots(self)]

    @contextmanager
    def replaced(self, new: Sequence[Tensor]) -> Iterator[None]:
        """Other tensors in the parameters' places, in the order of ``trainable_tensors``."""
        if not new:
            yield
            return
        slots = _slots(self)
        kept = [(owner, name, owner._parameters[name]) for owner, name in slots]
        for (owner, name), tensor in zip(slots, new, strict=True):
            owner._parameters[name] = tensor  # type: ignore[assignment]
        try:
            yield
        finally:
            for owner, name, value in kept:
                owner._parameters[name] = value

    @contextmanager
    def inside_edit(self) -> Iterator[None]:
        """Plain local parameters for the time of an edit."""
        if any(isinstance(p, DTensor) for p in self.parameters()) and not self._sharded:
            with self.replaced(self.trainable_tensors()):
                yield
        else:
            yield

    _sharded = False

    @contextmanager
    def as_dtensors(self, mesh: DeviceMesh) -> Iterator[None]:
        """Parameters as replicated DTensors on ``mesh``, for an edit that runs on shards."""
        tensors = [
            DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False) for t in self.trainable_tensors()
        ]
        before, self._sharded = self._sharded, True
        try:
            with self.replaced(tensors):
                yield
        finally:
            self._sharded = before

    # -- a pipeline's step -------------------------------------------------------------------------------------
    def set_aside(self) -> list[Tensor | None]:
        """Take the gradients accumulated so far away: a step's own are completed by themselves."""
        before = []
        for parameter in self.parameters():
            before.append(parameter.grad)
            parameter.grad = None
        return before

    def put_back(self, before: Sequence[Tensor | None]) -> None:
        if before:
            for parameter, grad in zip(self.parameters(), before, strict=True):
                parameter.grad = grad

    def complete(self, mesh: ModelMesh, stage: ModelMesh, divide: int, before: Sequence[Tensor | None]) -> None:
        """Sum the step's gradients over the stages, mean them over data axes, and add those from before. Collective."""
        axis = mesh.stage_axis
        assert axis is not None
        parameters = [p for p in self.parameters() if p.requires_grad and _unreduced(p) is not None]
        flags = torch.tensor([p.grad is not None for p in parameters], dtype=torch.long, device=_device(parameters))
        if parameters:
            dist.all_reduce(flags, group=mesh.group(axis))
        used = [p for p, flag in zip(parameters, flags.tolist(), strict=True) if flag]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [local for p in used if (local := _unreduced(p.grad)) is not None]
        if grads:
            flat = _flat(grads)
            dist.all_reduce(flat, group=mesh.group(axis))
            _unflatten(flat / divide, grads)
        self.mean_gradients(stage)
        for parameter, grad in zip(self.parameters(), before, strict=True):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad

    def kept_apart(self) -> list[Tensor]:
        """The parameters for an edit of rows that a rank has for itself: what they get there is no other rank's."""
        if any(_unreduced(owner._parameters[name]) is None for owner, name in _slots(self)):
            raise EditError(
                f"rank {dist.get_rank()}: trainable modules that an engine has sharded cannot be used on rows that are "
                f"tokens at experts; leave register_trainable_module's modules out of fully_shard.",
                page="trainable-sharded",
            )
        return [_SetAside.apply(t, self._aside, i) for i, t in enumerate(self.trainable_tensors())]

    def _bring_back(self, mesh: ModelMesh) -> None:
        """What was set aside, summed over the tensor axes; a rank that had no rows has zeros. Collective."""
        slots = [owner._parameters[name] for owner, name in _slots(self)]
        if not slots:
            return
        marks = [(p.grad is not None) + 2 * (i in self._aside) for i, p in enumerate(slots)]  # type: ignore[union-attr]
        seen = [max(m & 1 for m in all_) + 2 * max(m >> 1 for m in all_) for all_ in _over_ranks(marks, mesh)]
        for p, mark in zip(slots, seen, strict=True):
            if mark and p.grad is None:  # type: ignore[union-attr]
                p.grad = torch.zeros_like(p)  # type: ignore[arg-type,union-attr]
        kept, self._aside = dict(self._aside), {}
        for i in (i for i, mark in enumerate(seen) if mark & 2):
            mine = _plain(slots[i])
            part = kept.get(i, torch.zeros_like(mine)).contiguous()
            for axis in (a for a, x in enumerate(mesh.axes) if x.kind == "tensor"):
                dist.all_reduce(part, group=mesh.group(axis))
            if (grad := _unreduced(slots[i].grad)) is not None:  # type: ignore[union-attr]
                grad += part

    def mean_gradients(self, mesh: ModelMesh, *, uneven: bool = False) -> None:
        """Mean of the gradients over the data axes, in one message. A no-op for ranks that agree already.

        ``uneven``: edits may have run on rows that are a rank's own, and on some ranks not at all.
        """
        if uneven and len(self):
            self._bring_back(mesh)
        data = [i for i, a in enumerate(mesh.axes) if a.kind == "data"]
        grads = [local for p in self.parameters() if (local := _unreduced(p.grad)) is not None]
        if not data or not grads or not mesh.mean:
            return
        flat = _flat(grads)
        for i in data:
            dist.all_reduce(flat, group=mesh.group(i))
            flat /= mesh.axes[i].size
        _unflatten(flat, grads)


def _device(tensors: Sequence[Tensor]) -> torch.device:
    return tensors[0].device if tensors else torch.device("cpu")


def _flat(grads: Sequence[Tensor]) -> Tensor:
    return torch.cat([g.detach().flatten().to(_widest(grads)) for g in grads])


def _unflatten(flat: Tensor, grads: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view(grad.shape))


class _SetAside(torch.autograd.Function):
    """A parameter as it is; its gradient is added up in ``kept`` instead."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, kept: dict[int, Tensor], slot: int) -> Tensor:
        ctx.kept, ctx.slot = kept, slot
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        before = ctx.kept.get(ctx.slot)
        ctx.kept[ctx.slot] = grad.clone() if before is None else before + grad
        return torch.zeros_like(grad), None, None


def _over_ranks(marks: list[int], mesh: ModelMesh) -> list[tuple[int, ...]]:
    """All ranks' marks, by slot."""
    return list(zip(*all_gather_ints(marks, mesh.world), strict=True))


def _plain(parameter: Tensor | None) -> Tensor:
    assert parameter is not None
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _widest(grads: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32


def _unreduced(grad: Tensor | None) -> Tensor | None:
    """This rank's gradient; None where an engine holds the module too, and shards and reduces its gradients itself."""
    if not isinstance(grad, DTensor):
        return grad
    return grad.to_local() if all(isinstance(p, Replicate) for p in grad.placements) else None
