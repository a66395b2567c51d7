"""FSDP2 and HSDP (``fully_shard``): parameters are DTensors over the data mesh, activations plain local batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from flex_model.engines.engine import Engine, GradientSite, Held, axes_of_mesh
from flex_model.layout.mesh import Axis

__all__ = ["FSDP2Engine"]


class FSDP2Engine(Engine):
    """Any module of the model is an FSDPModule."""

    name: ClassVar[str] = "FSDP2"

    @classmethod
    def find(cls, module: nn.Module) -> FSDP2Engine | None:
        return cls(module) if any(isinstance(m, FSDPModule) for m in module.modules()) else None

    @property
    def meshes(self) -> list[DeviceMesh]:
        found: list[DeviceMesh] = []
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                found += [g.mesh_info.mesh for g in _groups(module) if g.mesh_info.mesh not in found]
        return found

    @property
    def axes(self) -> list[Axis]:
        return [axis for mesh in self.meshes for axis in axes_of_mesh(mesh, "data", "fsdp")]

    def plain_class(self, module: nn.Module) -> type | None:
        if not isinstance(module, FSDPModule):
            return None
        bases = type(module).__bases__  # fully_shard makes a class of (FSDPModule, the original class)
        return next(b for b in bases if b is not FSDPModule)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        # A forward leaves the root's parameters whole for a backward that will not come.
        modules: list[Any] = [m for m in self.module.modules() if isinstance(m, FSDPModule)]
        before = [_is_sharded(m) for m in modules]
        try:
            yield
        finally:
            for module, was_sharded in zip(modules, before, strict=True):
                if was_sharded and not _is_sharded(module):
                    module.reshard()
                elif not was_sharded and _is_sharded(module):
                    module.unshard()

    @property
    def held(self) -> Iterable[Held]:
        return [Held(m, m) for m in self.module.modules() if isinstance(m, FSDPModule)]

    def gradient_site(self, owner: nn.Module, attribute: str) -> GradientSite | None:
        # The parameter's own hook never fires, and a root whose inputs need no gradient is reduced at the very end.
        return GradientSite("finished") if self._managed(owner, attribute) is not None else None

    def gradient_before(self, owner: nn.Module, attribute: str) -> Tensor | None:
        grad = self._grad(owner, attribute)
        return None if grad is None else grad.to_local().detach().clone()

    def full_gradient(self, owner: nn.Module, attribute: str, before: Tensor | None) -> Tensor | None:
        grad = self._grad(owner, attribute)
        if grad is None:
            return None
        local = grad.to_local().detach()
        if before is not None:
            local = local - before
        new = DTensor.from_local(
            local, grad.device_mesh, grad.placements, run_check=False, shape=grad.shape, stride=grad.stride()
        )
        return new.full_tensor()

    def kept_parameters(self) -> dict[tuple[int, str], Tensor]:
        return {(id(owner), name): record.sharded_param for owner, name, record in self._records()}

    def _records(self) -> Iterator[tuple[nn.Module, str, Any]]:
        """(owner, attribute, FSDP2's record) of its parameters; the owner may hold the unsharded one at the moment."""
        for module in self.module.modules():
            for record in (p for g in _groups(module) for p in g.fsdp_params):
                info = record._module_info
                yield info.module, info.param_name, record
                for owner, name in zip(info.shared_modules, info.shared_param_names, strict=True):
                    yield owner, name, record

    def _managed(self, owner: nn.Module, attribute: str) -> Any:
        return next((r for m, n, r in self._records() if m is owner and n == attribute), None)

    def _grad(self, owner: nn.Module, attribute: str) -> DTensor | None:
        record = self._managed(owner, attribute)
        grad = None if record is None else record.sharded_param.grad
        return grad if isinstance(grad, DTensor) else None

    def add_to_gradient(self, owner: nn.Module, attribute: str, change: Tensor) -> None:
        grad = self._grad(owner, attribute)
        assert grad is not None
        part = distribute_tensor(change, grad.device_mesh, grad.placements, src_data_rank=None)
        grad.to_local().add_(part.to_local())


def _is_sharded(module: nn.Module) -> bool:
    return all(group.is_sharded for group in _groups(module))


def _groups(module: nn.Module) -> list[Any]:
    """FSDP2's groups of parameters, which a module had one of, if any, before torch 2.13."""
    if not isinstance(module, FSDPModule):
        return []
    state: Any = module._get_fsdp_state()
    only = getattr(state, "_fsdp_param_group", None)
    groups: list[Any] = getattr(state, "_fsdp_param_groups", [] if only is None else [only])
    return groups
