"""Megatron-core: parameters that are plain tensors with marks on them, groups in layers and in ``parallel_state``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Partial
from torch.distributed.tensor.placement_types import Placement

from flex_model.engines import megatron_twin
from flex_model.engines.engine import Engine, GradientSite
from flex_model.engines.fused import fused_beside
from flex_model.engines.megatron_experts import Mixtures, inside_experts
from flex_model.engines.megatron_layers import (
    Share,
    gated,
    in_unequal_blocks,
    is_a,
    is_megatron,
    kind,
    meets_parts,
    share_of,
    shared_keys,
    sums_later,
    tensor_group,
)
from flex_model.engines.megatron_rows import row_sources
from flex_model.errors import LayoutError, MeshError
from flex_model.layout.layout import merge_parts
from flex_model.layout.mesh import Axis, AxisKind
from flex_model.routing.collectives import all_gather_parts
from flex_model.routing.rows import RowSource
from flex_model.trees import first_tensor

__all__ = ["MegatronEngine"]


class MegatronEngine(Engine):
    """Some module is one of Megatron-core's, or some parameter carries its mark ``tensor_model_parallel``."""

    name: ClassVar[str] = "Megatron-core"

    @classmethod
    def find(cls, module: nn.Module) -> MegatronEngine | None:
        if "megatron.core.parallel_state" not in sys.modules:
            return None
        return cls(module) if any(is_megatron(m) for m in module.modules()) else None

    @classmethod
    def wrapped(cls, module: nn.Module) -> str | None:
        if "megatron.core.parallel_state" not in sys.modules:
            return None
        return "module" if kind(module) in ("DistributedDataParallel", "Float16Module") else None

    # -- axes --------------------------------------------------------------------------------------------------
    @property
    def axes(self) -> list[Axis]:
        context = self._group("context")
        if context is not None and context.size() > 1 and self._is_global:
            raise MeshError(
                f"the model uses Megatron's context parallelism over {context.size()} ranks, which is not supported "
                f"yet; expected context_parallel_size=1.",
                page="engine-unsupported",
            )
        data, tensor = self._data_group, self._tensor_group
        found: list[tuple[str, AxisKind, Any]] = [("dp", "data", data), ("tp", "tensor", tensor)]
        return [
            Axis(name, which, tuple(dist.get_process_group_ranks(group)))
            for name, which, group in found
            if group is not None and group.size() > 1
        ]

    @cached_property
    def _tensor_group(self) -> Any:
        """The group of the model's own layers; a model without any lies as parallel_state says."""
        experts = {id(m) for m in inside_experts(self.module)}
        groups = {id(m): tensor_group(m) for m in self.module.modules() if id(m) not in experts}
        own = [group for group in groups.values() if group is not None]
        for group in own:
            mine, first = (sorted(dist.get_process_group_ranks(g)) for g in (group, own[0]))
            if mine != first:
                raise MeshError(
                    f"the model's layers are spread over different tensor-parallel groups, ranks {first} and {mine}; "
                    f"build all of them with one.",
                    page="engine-unsupported",
                )
        return own[0] if own else self._group("tensor_model")

    @property
    def _is_global(self) -> bool:
        """Whether the model lies as parallel_state says, and not over groups of its own."""
        state, own = self._group("tensor_model"), self._tensor_group
        return state is not None and dist.get_process_group_ranks(own) == dist.get_process_group_ranks(state)

    @cached_property
    def _data_group(self) -> Any:
        wrappers = [m for m in self.module.modules() if kind(m) == "DistributedDataParallel"]
        group = getattr(wrappers[0], "dp_group", None) if wrappers else None
        return group or (self._group("data") if self._is_global else None)

    @staticmethod
    def _group(name: str) -> Any:
        """A group of parallel_state; None where it has none."""
        state = sys.modules["megatron.core.parallel_state"]
        return getattr(state, f"get_{name}_parallel_group")() if _initialized(state) else None

    @property
    def lockstep(self) -> bool:
        # Without gradients nothing makes data ranks run the same number of forwards.
        return torch.is_grad_enabled() or self._data_group is None or self._data_group.size() == 1

    # -- parameters --------------------------------------------------------------------------------------------
    @cached_property
    def _shares(self) -> dict[int, Share]:
        """{id of a parameter that is not whole here: how it lies}"""
        unequal, pairs = in_unequal_blocks(self.module), gated(self.module)
        return {
            id(p): share
            for m in self.module.modules()
            for name, p in m.named_parameters(recurse=False)
            if (share := share_of(m, name, p, self._tensor_group, 1 + (id(m) in pairs), id(m) in unequal)) is not None
        }

    def full_shape(self, parameter: Tensor) -> tuple[int, ...] | None:
        share = self._shares.get(id(parameter))
        return None if share is None else share.full_shape(parameter)

    def full_parameter(self, owner: nn.Module, attribute: str) -> Tensor | None:
        parameter = owner._parameters[attribute]
        share = self._shares.get(id(parameter))
        if problem := self._no_whole(owner, share):
            raise LayoutError(
                f"the full parameter {attribute!r} of {type(owner).__name__} is unknown on rank {dist.get_rank()}: "
                f"{problem}.",
                page="parameter-unknown",
            )
        if parameter is None or share is None:
            return None
        local = parameter.detach()
        parts = all_gather_parts(local, [tuple(local.shape)] * share.ranks, share.group)
        return merge_parts(parts, share.placement)

    def gradient_site(self, owner: nn.Module, attribute: str) -> GradientSite | None:
        parameter = owner._parameters[attribute]
        share = self._shares.get(id(parameter))
        stated: dict[AxisKind, Placement] = {"data": Partial("avg")}
        if problem := self._no_whole(owner, share):
            return GradientSite("local", refusal=problem)
        if share is not None:
            if all(axis.ranks != share.line for axis in self.axes if axis.kind == "tensor"):
                return GradientSite("local", refusal="it is sharded over ranks that are no axis of the model")
            stated["tensor"] = share.placement
        elif self._mixtures.own_tokens(owner):
            stated["tensor"] = Partial("sum")
        elif parameter is not None and (how := sums_later(parameter)) is not None:
            stated["tensor"] = Partial(how)  # until finalize_model_grads
        elif id(owner) in self._head_norms:
            stated["tensor"] = Partial("sum")
        return GradientSite("local", stated)

    def _no_whole(self, owner: nn.Module, share: Share | None) -> str:
        """Why a parameter has no whole, or none that is known; "" where it has."""
        if self._mixtures.spread(owner):
            return "other ranks have other experts by this name"
        return "" if share is None else share.unknown

    def keep_alive(self) -> bool:
        # Buckets that are reduced during the backward wait for every parameter in them.
        wrappers = [m for m in self.module.modules() if kind(m) == "DistributedDataParallel"]
        return any(m.ddp_config.overlap_grad_reduce for m in wrappers)  # type: ignore[union-attr]

    # -- layouts -----------------------------------------------------------------------------------------------
    def order(self, module: nn.Module, side: str, dim: int, size: int) -> int | str | None:
        if dim != -1:
            return None
        own = [s for p in module.parameters(recurse=False) if (s := self._shares.get(id(p))) and s.dim == 0]
        if own:
            return None if side == "in" else own[0].unknown or own[0].blocks
        if size in self._fused.get(id(module), ()):
            return f"dim {dim} has the size of a fused projection beside it, so its blocks may be interleaved"
        return None

    @cached_property
    def _mixtures(self) -> Mixtures:
        ranks = {axis.kind: axis.ranks for axis in self.axes}
        here = (dist.get_rank(),)
        return Mixtures(self.module, ranks.get("tensor", here), ranks.get("data", here))

    @cached_property
    def row_sources(self) -> Sequence[RowSource]:
        return row_sources(self.module, self._mixtures.tensor)

    def unknown(self, module: nn.Module, side: str, index: int) -> str:
        return self._mixtures.unknown(module)

    def batch_dim(self, module: nn.Module, inputs: Any) -> int:
        found = first_tensor(inputs)
        activation = found is not None and found.is_floating_point() and found.dim() == 3
        return 1 if activation and is_megatron(module) else 0  # [s, b, h], and [b, s] of the tokens that a model takes

    def flattens(self, module: nn.Module, side: str) -> bool:
        return side == "out" and self._mixtures.routes(module)

    def inner_rows(self, module: nn.Module, inputs: Any) -> int:
        found = first_tensor(inputs)
        assert found is not None
        return found.shape[1]  # [s, b, h] became [s * b, experts]

    def placements(self, module: nn.Module, side: str, index: int, dims: int) -> Mapping[tuple[int, ...], Placement]:
        return self._mixtures.placements(module, side, index)

    def doubt(self, module: nn.Module, side: str) -> str:
        if side == "in":
            return ""
        if kind(module) is None and any(id(p) in self._shares for p in module.parameters(recurse=False)):
            return f"{type(module).__name__} has parameters that Megatron marks as sharded, and is none of its layers"
        return ""

    def late_gradients(self, module: nn.Module, side: str, index: int) -> list[tuple[int, ...]]:
        shared = (side, index) in self._shared_keys.get(id(module), ())
        if not shared and not meets_parts(module, side, index) and not self._mixtures.late_gradients(module, side):
            return []
        return [axis.ranks for axis in self.axes if axis.kind == "tensor"]

    @cached_property
    def _shared_keys(self) -> dict[int, tuple[tuple[str, int], ...]]:
        """{id of a module: its values (side, index) that are the key or the value of all tensor ranks}"""
        return {id(m): places for a in self.module.modules() for m, places in shared_keys(a)}

    @cached_property
    def _head_norms(self) -> set[int]:
        """Norms of queries and keys: each rank has them whole, for its own heads."""
        attentions = [m for m in self.module.modules() if is_a(m, "Attention")]
        return {id(getattr(a, name, None)) for a in attentions for name in ("q_layernorm", "k_layernorm")}

    @cached_property
    def _fused(self) -> dict[int, set[int]]:
        def outputs(parameter: Tensor) -> tuple[int, bool] | None:
            share = self._shares.get(id(parameter))
            if share is None or share.dim != 0:
                return None
            return share.full_shape(parameter)[0], bool(share.unknown) or share.blocks > 1

        return fused_beside(self.module, outputs)

    # -- the twin ----------------------------------------------------------------------------------------------
    def stand_ins(self) -> Mapping[int, object]:
        return megatron_twin.stand_ins(self.module)

    def make_whole(self, twin: nn.Module) -> None:
        megatron_twin.make_whole(twin)

    @contextmanager
    def alone(self) -> Iterator[None]:
        with megatron_twin.alone():
            yield


def _initialized(state: Any) -> bool:
    return bool(state.model_parallel_is_initialized())
