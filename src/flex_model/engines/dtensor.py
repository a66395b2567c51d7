"""torch's own tensor parallelism (``parallelize_module``): parameters are DTensors over a tensor mesh."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import ClassVar

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from flex_model.engines.engine import Engine, GradientSite, axes_of_mesh
from flex_model.engines.fused import fused_beside
from flex_model.layout.layout import shard_dim, split_factor
from flex_model.layout.mesh import Axis
from flex_model.layout.twin import Mimic
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

    @property
    def sharding(self) -> frozenset[tuple[int, ...]]:
        seen: dict[int, tuple[DeviceMesh, set[int]]] = {}  # by id: meshes are compared in Python
        for parameter in self.module.parameters():
            spec = sharding(parameter)
            if spec is not None:
                _, dims = seen.setdefault(id(spec.mesh), (spec.mesh, set()))
                dims.update(i for i, p in enumerate(spec.placements) if shard_dim(p) is not None)
        return frozenset(axes_of_mesh(mesh, "tensor", "tp")[i].ranks for mesh, dims in seen.values() for i in dims)

    def order(self, module: nn.Module, side: str, dim: int, size: int) -> int | str | None:
        if dim != -1:
            return None
        own = [f for p in module._parameters.values() if p is not None and (f := _blocks(p)) is not None]
        if own:
            return own[0] if side == "out" else None
        if size in self._fused.get(id(module), ()):
            return f"dim {dim} has the size of a fused projection beside it, so its blocks may be interleaved"
        return None

    @cached_property
    def _fused(self) -> dict[int, set[int]]:
        return fused_beside(self.module, _outputs)

    @contextmanager
    def mimicked(self) -> Iterator[Mimic]:
        # Local code without the collectives between modules: it cannot always run, and what it shows then is right.
        yield Mimic(exact=False)

    def parted(self, owner: nn.Module, attribute: str) -> list[tuple[int, ...]]:
        spec = sharding(getattr(owner, attribute))
        if spec is None:
            return []
        lines = [a.ranks for a in axes_of_mesh(spec.mesh, "tensor", "tp")]
        return [line for line, p in zip(lines, spec.placements, strict=True) if not isinstance(p, Replicate)]

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


def _blocks(parameter: Tensor) -> int | None:
    """How many blocks a weight's sharded output features consist of; None where they are not sharded."""
    if not isinstance(parameter, DTensor) or parameter.dim() < 2:
        return None
    placement = parameter.placements[-1]  # those before it are FSDP2's, whose strides are another matter
    dim = shard_dim(placement)
    if dim is None or dim % parameter.dim() != parameter.dim() - 2:
        return None
    return split_factor(placement)


def _outputs(parameter: Tensor) -> tuple[int, bool] | None:
    blocks = _blocks(parameter)
    return None if blocks is None else (int(parameter.shape[-2]), blocks != 1)
