"""Megatron-core's mixtures of experts: which of their values have a whole, and how those lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from flex_model.engines.megatron_layers import is_a

__all__ = ["Mixtures", "inside_experts"]

Line = tuple[int, ...]


def inside_experts(model: nn.Module) -> dict[nn.Module, Any]:
    """{every module that is a part of experts: their layer}"""
    layers: list[Any] = [m for m in model.modules() if is_a(m, "MoELayer")]
    return {m: layer for layer in layers for m in layer.experts.modules()}


class Mixtures:
    """The mixtures of experts of one model. ``tensor`` and ``data`` are the ranks along the model's axes."""

    def __init__(self, model: nn.Module, tensor: Line, data: Line) -> None:
        self.tensor, self._data = tensor, data
        layers: list[Any] = [m for m in model.modules() if is_a(m, "MoELayer")]
        self._inside = {id(m): layer for m, layer in inside_experts(model).items()}
        self._routers = {id(layer.router): layer for layer in layers}

    def holds(self, module: nn.Module) -> bool:
        """Whether a module is a part of some experts."""
        return id(module) in self._inside

    def routes(self, module: nn.Module) -> bool:
        return id(module) in self._routers

    def spread(self, module: nn.Module) -> bool:
        """Whether other ranks hold other experts under the same name."""
        layer = self._inside.get(id(module))
        return layer is not None and layer.ep_group is not None and layer.ep_group.size() > 1

    def own_tokens(self, module: nn.Module) -> bool:
        """Whether the experts are whole on every tensor rank, and run on the tokens of its part of the sequence."""
        layer = self._inside.get(id(module))
        return layer is not None and self.tensor != _line(layer.experts.tp_group) and layer.config.sequence_parallel

    def unknown(self, module: nn.Module) -> str:
        """Why the rows of a value inside experts have no whole; "" where they have."""
        if id(module) not in self._inside:
            return ""
        rows = "its rows are tokens at experts"
        if self.spread(module):
            return f"{rows}, and other ranks have other experts by this name"
        if len(self._data) > 1:
            return f"{rows}, of this rank's part of the batch, sorted by expert"
        if len(self.tensor) > 1 and self.tensor != _line(self._inside[id(module)].experts.tp_group):
            return f"{rows}, of this rank's part of the sequence, sorted by expert"
        return ""

    def placements(self, module: nn.Module, side: str, index: int) -> Mapping[Line, Placement]:
        """How the features of rows at experts lie, and the rows that a router has."""
        if id(module) in self._routers and side == "out":  # with the sequence and the batch apart
            parts = self._routers[id(module)].config.sequence_parallel
            return {self._data: Shard(1), self.tensor: Shard(0) if parts else Replicate()}
        if len(self.tensor) == 1:
            return {}
        if id(module) not in self._inside or self.unknown(module):
            return {}
        if is_a(module, "ColumnParallelLinear"):
            return {self.tensor: Replicate() if side == "in" else _features(module)}
        if is_a(module, "RowParallelLinear") and side == "in":
            return {self.tensor: Shard(-1)}
        return {self.tensor: Replicate() if side == "in" else Partial("sum")}

    def late_gradients(self, module: nn.Module, side: str) -> bool:
        """Whether ranks meet parts of the gradient of a value that they all have: the tokens, before they are run."""
        inside = id(module) in self._inside and not self.unknown(module) and len(self.tensor) > 1
        return inside and side == "in" and not is_a(module, "RowParallelLinear")


def _line(group: Any) -> Line:
    return tuple(dist.get_process_group_ranks(group)) if isinstance(group, dist.ProcessGroup) else ()


def _features(layer: Any) -> Placement:
    blocks = max(getattr(layer.weight, "partition_stride", 1), 1 + bool(layer.config.gated_linear_unit))
    return Shard(-1) if blocks == 1 else _StridedShard(-1, split_factor=blocks)
