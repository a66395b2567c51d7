"""DistributedDataParallel: one data axis; gradients are meant over it during the backward."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Partial
from torch.nn.parallel import DistributedDataParallel

from flex_model.engines.engine import Engine, GradientSite
from flex_model.layout.mesh import Axis

__all__ = ["DDPEngine"]


class DDPEngine(Engine):
    """DDP around the model, or around FlexModel itself (found while its forward runs)."""

    name: ClassVar[str] = "DDP"

    def __init__(self, module: nn.Module, ddp: DistributedDataParallel) -> None:
        super().__init__(module)
        self._ddp = weakref.ref(ddp)  # it may be around FlexModel, and go

    @classmethod
    def find(cls, module: nn.Module) -> DDPEngine | None:
        if isinstance(module, DistributedDataParallel):
            return cls(module, module)
        active = DistributedDataParallel._get_active_ddp_module()  # set while a DDP runs its forward
        if active is not None and any(m is module for m in active.modules()):
            return cls(module, active)
        return None

    @property
    def alive(self) -> bool:
        return self._ddp() is not None

    @property
    def ddp(self) -> DistributedDataParallel:
        ddp = self._ddp()
        assert ddp is not None
        return ddp

    @property
    def axes(self) -> list[Axis]:
        return [Axis("dp", "data", tuple(dist.get_process_group_ranks(self.ddp.process_group)))]

    def watched_modules(self) -> list[nn.Module]:
        return list(self.ddp.modules())

    @property
    def lockstep(self) -> bool:
        # Without gradients DDP synchronises nothing: evaluation loops and generate may differ in length.
        return torch.is_grad_enabled()

    def gradient_site(self, owner: nn.Module, attribute: str) -> GradientSite:
        # Met before the reducer means it; equal gradients on all ranks pass the reducer unchanged.
        return GradientSite("local", {"data": Partial("avg")})

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        # Over tensor parallelism the first forward turns parameters into DTensors, with or without a graph to them.
        modules = [m for m in self.watched_modules() if any(hasattr(p, "_st_info") for p in m._parameters.values())]
        before = [(m, dict(m.__dict__), dict(m._parameters)) for m in modules]
        try:
            yield
        finally:
            for module, attributes, parameters in before:
                module.__dict__.clear()
                module.__dict__.update(attributes)
                module._parameters.clear()
                module._parameters.update(parameters)

    def keep_alive(self) -> bool:
        return not self.ddp.find_unused_parameters
