"""``replicate`` (torch.distributed._composable): DistributedDataParallel by hooks on the model itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from flex_model.engines.ddp import DDPEngine
from flex_model.layout.mesh import Axis

__all__ = ["ReplicateEngine"]


class ReplicateEngine(DDPEngine):
    """Some module carries replicate's state. The DDP in it holds parameters alone, and is made in the first forward."""

    name: ClassVar[str] = "replicate"

    def __init__(self, module: nn.Module, state: Any) -> None:
        self.module, self._state = module, state

    @classmethod
    def find(cls, module: nn.Module) -> ReplicateEngine | None:
        state = next((s for m in module.modules() if (s := _state(m)) is not None), None)
        return None if state is None else cls(module, state)

    @property
    def alive(self) -> bool:
        return True

    @property
    def _options(self) -> dict[str, Any]:
        """What replicate was given; its state forgets it when it makes its DDP, which then knows."""
        if self._state.has_initialized:
            ddp = self._state._ddp
            return {"process_group": ddp.process_group, "find_unused_parameters": ddp.find_unused_parameters}
        options: dict[str, Any] = self._state._init_kwargs
        return options

    @property
    def meshes(self) -> list[DeviceMesh]:
        mesh = self._options.get("device_mesh")
        return [] if mesh is None else [mesh]

    @property
    def axes(self) -> list[Axis]:
        mesh, group = self._options.get("device_mesh"), self._options.get("process_group")
        group = mesh.get_group() if mesh is not None else group
        return [Axis("dp", "data", tuple(dist.get_process_group_ranks(group or dist.group.WORLD)))]

    def watched_modules(self) -> list[nn.Module]:
        return list(self.module.modules())

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        # Over tensor parallelism, making its DDP takes DTensors from the model, and the first forward puts them back.
        if not self._state.has_initialized:
            self._state.lazy_init()
        with super().undisturbed():
            yield

    def plain_class(self, module: nn.Module) -> type | None:
        composable = sys.modules["torch.distributed._composable.replicate"]
        return type(module).__mro__[2] if isinstance(module, composable.DDP) else None  # (DDPNet, DDP, Net)

    def keep_alive(self) -> bool:
        return not self._options.get("find_unused_parameters", False)


def _state(module: nn.Module) -> Any:
    replicate = sys.modules.get("torch.distributed._composable.replicate")
    tables = (v for k, v in module.__dict__.items() if k.startswith("__composable_api") and isinstance(v, dict))
    states = (s for table in tables for s in table.values())
    return None if replicate is None else next((s for s in states if isinstance(s, replicate._ReplicateState)), None)
