"""What Megatron-core's layers and the marks on their parameters say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

__all__ = [
    "Share",
    "gated",
    "in_unequal_blocks",
    "is_a",
    "is_megatron",
    "kind",
    "share_of",
    "shared_keys",
    "sums_later",
    "tensor_group",
]

_PACKAGE = "megatron.core."

# Their fused projections are several blocks of unequal size, each sharded for itself.
_UNEQUAL = ("MambaMixer", "GatedDeltaNet")

# Their second output is the bias of a row-parallel layer, which is the caller's to add.
_RETURN_BIAS = ("RowParallelLinear", "TERowParallelLinear", "Attention", "MLP")


def kind(module: nn.Module) -> str | None:
    """The name of Megatron's class that a module is or inherits from; None where it is none of its."""
    return next((c.__name__ for c in type(module).__mro__ if c.__module__.startswith(_PACKAGE)), None)


def is_a(module: nn.Module, name: str) -> bool:
    return any(c.__name__ == name and c.__module__.startswith(_PACKAGE) for c in type(module).__mro__)


def is_megatron(module: nn.Module) -> bool:
    return kind(module) is not None or any(_marked(p) for p in module._parameters.values())


def _marked(parameter: Tensor | None) -> bool:
    return bool(getattr(parameter, "tensor_model_parallel", False))


def tensor_group(module: nn.Module) -> Any:
    """The tensor-parallel group that a layer was built over."""
    if not is_megatron(module):
        return None
    for attribute in ("tp_group", "_tp_group"):
        group = getattr(module, attribute, None)
        if isinstance(group, dist.ProcessGroup):
            return group
    return None


@dataclass(frozen=True, slots=True)
class Share:
    """How a parameter is spread: over which group, along which dim, in how many blocks that are each sharded for
    itself; or why that is ``unknown``."""

    group: Any
    dim: int
    blocks: int = 1
    unknown: str = ""

    @property
    def ranks(self) -> int:
        return int(self.group.size())

    @property
    def line(self) -> tuple[int, ...]:
        return tuple(dist.get_process_group_ranks(self.group))

    @property
    def placement(self) -> Placement:
        return Shard(self.dim) if self.blocks == 1 else _StridedShard(self.dim, split_factor=self.blocks)

    def full_shape(self, parameter: Tensor) -> tuple[int, ...]:
        shape = tuple(parameter.shape)
        return (*shape[: self.dim], shape[self.dim] * self.ranks, *shape[self.dim + 1 :])


def in_unequal_blocks(model: nn.Module) -> set[int]:
    """Ids of the modules in mixers whose fused projections are of unequal blocks."""
    mixers = [m for m in model.modules() if any(is_a(m, name) for name in _UNEQUAL)]
    return {id(m) for mixer in mixers for m in mixer.modules()}


def gated(model: nn.Module) -> set[int]:
    """Ids of the layers that hold gate and up in one, which not every version marks as two blocks."""
    mlps: list[Any] = [m for m in model.modules() if is_a(m, "MLP")]
    return {id(m.linear_fc1) for m in mlps if m.config.gated_linear_unit}


def share_of(owner: nn.Module, name: str, parameter: Tensor, group: Any, least: int, unequal: bool) -> Share | None:
    """How a parameter lies; None where this rank has it whole. ``group`` is that of layers that keep none, ``least``
    how many blocks it has if no mark says more."""
    group = tensor_group(owner) or group
    if group is None or group.size() == 1:
        return None
    if is_a(owner, "DotProductAttention") and name == "softmax_offset":  # one for each of its heads, without a mark
        return Share(group, 0)
    if not _marked(parameter):
        return None
    if is_a(owner, "GroupedMLP") or is_a(owner, "TEGroupedMLP"):
        return Share(group, 0, unknown="it packs several experts, each sharded for itself")
    dim = getattr(parameter, "partition_dim", -1)
    if dim < 0:
        return Share(group, 0, unknown="Megatron does not say which dim is sharded")
    if unequal and dim == 0:
        return Share(group, 0, unknown="it is in several blocks of unequal sizes, each sharded for itself")
    return Share(group, dim, max(least, getattr(parameter, "partition_stride", 1)))


def sums_later(parameter: Tensor) -> str | None:
    """How the gradient of a whole parameter will be reduced over tensor ranks; None where it is complete."""
    if getattr(parameter, "average_gradients_across_tp_domain", False):
        return "avg"
    return "sum" if getattr(parameter, "sequence_parallel", False) else None


def meets_parts(module: nn.Module, side: str, index: int) -> bool:
    """Whether a value that all tensor ranks have whole meets a part of its gradient on each of them."""
    config = getattr(module, "config", None)
    if side == "out" and index == 1 and getattr(config, "sequence_parallel", False):
        return any(is_a(module, name) for name in _RETURN_BIAS)  # it will be added to this rank's positions
    return False


def shared_keys(attention: Any) -> list[tuple[nn.Module, tuple[tuple[str, int], ...]]]:
    """Where all tensor ranks have the same key and value, each for its own queries: (module, (side, index))."""
    if not is_a(attention, "Attention") or not attention.config.num_query_groups == 1 < attention.world_size:
        return []
    found: list[tuple[nn.Module, tuple[tuple[str, int], ...]]] = [(attention.core_attention, (("in", 1), ("in", 2)))]
    if isinstance(norm := getattr(attention, "k_layernorm", None), nn.Module):
        found.append((norm, (("in", 0), ("out", 0))))
    return found
