"""What a copy of a Megatron-core model needs to run on one rank: whole sizes, and groups that need no partner."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _world

from flex_model.engines.megatron_kernels import shape_only

__all__ = ["alone", "make_whole", "stand_ins"]


class _Done:
    """The handle of a collective that is over."""

    def wait(self, *_: Any) -> bool:
        return True


class _AloneGroup:
    """A process group of one rank: its reductions change nothing."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0

    def allreduce(self, *_: Any) -> _Done:
        return _Done()


_ALONE = _AloneGroup()


class _MetaBuffer:
    """In place of the buffer that all layers share: what is asked for has no storage."""

    def get_tensor(self, shape: Any, dtype: torch.dtype, *_: Any, **__: Any) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device="meta")


class _NoDispatch:
    """In place of what brings tokens to experts: every token comes back as it went. A copy has this rank's experts
    only, and nothing of other ranks' tokens."""

    _shape: Any = ()

    def dispatch_preprocess(self, hidden: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        self._shape = hidden.shape
        return hidden.view(-1, hidden.shape[-1]), probs

    def combine_postprocess(self, hidden: Tensor) -> Tensor:
        return hidden.view(self._shape)


# Sizes that configurations keep, as they are without parallelism.
_WHOLE_CONFIG = {
    "tensor_model_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "context_parallel_size": 1,
    "sequence_parallel": False,
}


def stand_ins(model: nn.Module) -> dict[int, object]:
    """{id: what takes its place in a copy}: groups, and configurations, whose callbacks may hold the whole model."""
    found: dict[int, object] = {id(group): _ALONE for group in _world.pg_map}
    for module in model.modules():
        if hasattr(module, "token_dispatcher"):
            found[id(module.token_dispatcher)] = _NoDispatch()
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "tensor_model_parallel_size") and id(config) not in found:
            whole = copy.copy(config)
            for name, value in _WHOLE_CONFIG.items():
                if hasattr(whole, name):
                    object.__setattr__(whole, name, value)
            found[id(config)] = whole
    return found


# -- sizes that modules keep -----------------------------------------------------------------------------------
_SAME_FOR_ALL: Mapping[str, Any] = {
    "sequence_parallel": False,
    "explicit_expert_comm": False,
    "allreduce_dgrad": False,
    "scaled_masked_softmax_fusion": False,  # its kernels have no meta implementation
}


def make_whole(twin: nn.Module) -> None:
    for module in twin.modules():
        known = module.__dict__
        if isinstance(known.get("token_dispatcher"), _NoDispatch):
            known["dispatch"] = lambda hidden, probs: (hidden, probs)
            known["routed_experts_compute"] = lambda hidden, probs: (hidden, None)
            known["combine"] = lambda hidden: hidden
        if (forward := shape_only(module)) is not None:
            known["forward"] = forward
        for name, value in _SAME_FOR_ALL.items():
            if name in known:
                known[name] = value
        for part, whole in _sizes(module).items():
            if part in known:
                known[part] = whole
    for module in twin.modules():  # their own configuration may say one group of queries a rank
        inner = getattr(module, "core_attention", None)
        if isinstance(inner, nn.Module) and "num_query_groups_per_partition" in inner.__dict__:
            inner.num_query_groups_per_partition = module.num_query_groups_per_partition


def _sizes(module: nn.Module) -> dict[str, Any]:
    """{attribute that holds this rank's part of a size: the whole}"""
    known = module.__dict__
    out: dict[str, Any] = {"vocab_start_index": 0, "vocab_end_index": known.get("num_embeddings")}
    for whole in ("num_embeddings", "output_size", "input_size"):
        if whole in known:
            out[f"{whole}_per_partition"] = known[whole]
    config = known.get("config")
    if "num_attention_heads_per_partition" in known and config is not None:
        out["num_attention_heads_per_partition"] = config.num_attention_heads
        out["num_query_groups_per_partition"] = config.num_query_groups
        out["hidden_size_per_partition"] = config.kv_channels * config.num_attention_heads
        out["world_size"] = 1
    return out


# -- Megatron's globals ----------------------------------------------------------------------------------------
@contextmanager
def alone() -> Iterator[None]:
    """parallel_state, and the memory that layers share, as on one process; compiled functions run as written."""
    state = sys.modules["megatron.core.parallel_state"]
    before = dict(vars(state))
    for name, value in before.items():
        if isinstance(value, dist.ProcessGroup):
            setattr(state, name, _ALONE)
        elif name.startswith("_MPU_"):
            setattr(state, name, None)
    setattr(state, "_GLOBAL_MEMORY_BUFFER", _MetaBuffer())  # noqa: B010
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        vars(state).update(before)
