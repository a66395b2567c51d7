"""torch's own tensor parallelism (``parallelize_module``): parameters are DTensors over a tensor mesh."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from flex_model.engines.engine import Engine, GradientSite, axes_of_mesh, strided_order
from flex_model.layout.mesh import Axis
from flex_model.layout.values import sharding

__all__ = ["DTensorEngine"]


class DTensorEngine(Engine):
    """Some parameter is a DTensor. Axes that a data engine claims are taken from it when engines are combined."""

    name: ClassVar[str] = "DTensor"

    @classmethod
    def find(cls, module: nn.Module) -> DTensorEngine | None:
        return cls(module) if any(sharding(p) is not None for p in module.parameters()) else None

    @property
    def meshes(self) -> list[DeviceMesh]:
        found: list[DeviceMesh] = []
        for parameter in self.module.parameters():
            spec = sharding(parameter)
            if spec is not None and spec.mesh not in found:
                found.append(spec.mesh)
        return found

    @property
    def axes(self) -> list[Axis]:
        return [axis for mesh in self.meshes for axis in axes_of_mesh(mesh, "tensor", "tp")]

    def order(self, module: nn.Module, side: str, dim: int, ndim: int) -> int | str | None:
        return strided_order(module, dim, ndim) if side == "out" else None

    def gradient_site(self, owner: nn.Module, attribute: str) -> GradientSite:
        return GradientSite("local")

    def full_parameter(self, owner: nn.Module, attribute: str) -> Tensor | None:
        parameter = getattr(owner, attribute)
        spec = sharding(parameter)
        if spec is None:
            return None
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        whole = DTensor.from_local(
            local.detach(), spec.mesh, spec.placements, run_check=False, shape=spec.shape, stride=spec.stride
        )
        return whole.full_tensor()
