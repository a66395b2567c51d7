"""FSDP1 (``FullyShardedDataParallel``): flat parameters over one data axis, or two with hybrid sharding."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from math import prod
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from flex_model.engines.engine import Engine, GradientSite, Held
from flex_model.layout.mesh import Axis
from flex_model.routing.collectives import all_gather_flat

__all__ = ["FSDP1Engine"]


class FSDP1Engine(Engine):
    """Some module is wrapped in FSDP. Parameter hooks are met when the backward is done, from the flat gradient."""

    name: ClassVar[str] = "FSDP1"

    @classmethod
    def find(cls, module: nn.Module) -> FSDP1Engine | None:
        return cls(module) if any(isinstance(m, FSDP) for m in module.modules()) else None

    @property
    def axes(self) -> list[Axis]:
        first = next(m for m in self.module.modules() if isinstance(m, FSDP))
        shard = Axis("fsdp", "data", tuple(dist.get_process_group_ranks(first.process_group)))
        replicate = getattr(first, "_inter_node_pg", None)
        if replicate is None or dist.get_world_size(replicate) == 1:
            return [shard]
        return [Axis("dp_replicate", "data", tuple(dist.get_process_group_ranks(replicate))), shard]

    @property
    def held(self) -> Iterable[Held]:
        return [Held(m._fsdp_wrapped_module, m) for m in FSDP.fsdp_modules(self.module)]

    def hidden_parameters(self) -> list[tuple[nn.Module, str, nn.Parameter]]:
        out = []
        for wrapper in FSDP.fsdp_modules(self.module):
            handle: Any = wrapper._handle
            if handle is not None and not handle._use_orig_params:
                infos = [*handle.flat_param._param_infos, *handle.flat_param._shared_param_infos]
                out += [(i.module, i.param_name, handle.flat_param) for i in infos]
        return out

    def tied_places(self) -> list[tuple[tuple[nn.Module, str], tuple[nn.Module, str]]]:
        handles: list[Any] = [w._handle for w in FSDP.fsdp_modules(self.module) if w._handle is not None]
        shared = [info for handle in handles for info in handle.flat_param._shared_param_infos]
        return [((i.module, i.param_name), (i.prim_module, i.prim_param_name)) for i in shared]

    def whole_shapes(self) -> dict[tuple[int, str], tuple[int, ...]]:
        shapes: dict[tuple[int, str], tuple[int, ...]] = {}
        handles: list[Any] = [w._handle for w in FSDP.fsdp_modules(self.module) if w._handle is not None]
        for flat in (handle.flat_param for handle in handles):
            infos = zip(flat._param_infos, flat._shapes, strict=True)
            shapes |= {(id(i.module), i.param_name): tuple(shape) for i, shape in infos}
            for i in flat._shared_param_infos:
                shapes[id(i.module), i.param_name] = shapes[id(i.prim_module), i.prim_param_name]
        return shapes

    def _place(self, owner: nn.Module, attribute: str) -> tuple[Any, int, torch.Size] | None:
        """(handle, offset in the unsharded flat parameter, shape) of an original parameter."""
        for wrapper in FSDP.fsdp_modules(self.module):
            handle: Any = wrapper._handle
            if handle is None:
                continue
            flat = handle.flat_param
            infos = list(flat._param_infos)
            names = [(i.module, i.param_name) for i in infos]
            for shared in flat._shared_param_infos:
                if (shared.module, shared.param_name) == (owner, attribute):
                    owner, attribute = shared.prim_module, shared.prim_param_name
            if (owner, attribute) not in names:
                continue
            index = names.index((owner, attribute))
            sizes, padding = flat._numels_with_padding, flat._is_padding_mask
            starts = [0, *accumulate(sizes)]
            real = [start for start, pad in zip(starts, padding, strict=False) if not pad]
            return handle, real[index], flat._shapes[index]
        return None

    def parted(self, owner: nn.Module, attribute: str) -> list[tuple[int, ...]]:
        return [self.axes[-1].ranks] if self._place(owner, attribute) else []

    def gradient_site(self, owner: nn.Module, attribute: str) -> GradientSite | None:
        return GradientSite("finished") if self._place(owner, attribute) else None

    def full_parameter(self, owner: nn.Module, attribute: str) -> Tensor | None:
        place = self._place(owner, attribute)
        if place is None:
            return None
        handle, offset, shape = place
        flat = self._whole(handle, handle.flat_param.data)
        return flat[offset : offset + prod(shape)].view(shape).clone()

    def gradient_before(self, owner: nn.Module, attribute: str) -> Tensor | None:
        place = self._place(owner, attribute)
        grad = None if place is None else place[0].flat_param.grad
        if place is None or grad is None or not self._is_live(place[0]):
            return None
        before: Tensor = grad.detach().clone()
        return before

    def full_gradient(self, owner: nn.Module, attribute: str, before: Tensor | None) -> Tensor | None:
        place = self._place(owner, attribute)
        grad = None if place is None else place[0].flat_param.grad
        if place is None or grad is None:
            return None
        handle, offset, shape = place
        if handle.uses_sharded_strategy and not self._is_sharded(handle, grad):
            return None  # no_sync: it will be part of the gradient that is reduced
        if before is not None and before.shape == grad.shape:
            grad = grad - before
        flat = self._whole(handle, grad)
        return flat[offset : offset + prod(shape)].view(shape).clone()

    def add_to_gradient(self, owner: nn.Module, attribute: str, change: Tensor) -> None:
        place = self._place(owner, attribute)
        assert place is not None
        handle, offset, shape = place
        grad = handle.flat_param.grad
        start = 0 if not self._is_sharded(handle, grad) else dist.get_rank(handle.process_group) * grad.numel()
        low, high = max(offset, start), min(offset + prod(shape), start + grad.numel())
        if low < high:
            grad[low - start : high - start] += change.flatten()[low - offset : high - offset]

    @staticmethod
    def _is_live(handle: Any) -> bool:
        """zero_grad leaves an old flat gradient behind where the original parameters are used."""
        originals = handle.flat_param._params
        return originals is None or any(p.grad is not None for p in originals)

    @staticmethod
    def _is_sharded(handle: Any, flat: Tensor) -> bool:
        return bool(handle.uses_sharded_strategy) and flat.numel() == handle.flat_param._sharded_size.numel()

    def _whole(self, handle: Any, flat: Tensor) -> Tensor:
        """The unsharded flat tensor."""
        group = handle.process_group
        flat = flat.detach().reshape(-1)
        if self._is_sharded(handle, flat):
            out = flat.new_empty(flat.numel() * dist.get_world_size(group))
            all_gather_flat(out, flat.contiguous(), group=group)
            return out
        return flat
