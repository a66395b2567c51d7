"""Layers that run on a GPU's own kernels: in a copy without data, the shapes of what they return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flex_model.engines.megatron_layers import is_a

__all__ = ["shape_only"]

_LINEAR = ("TELinear", "TELayerNormColumnParallelLinear")
_NORMS = ("LayerNorm", "RMSNorm")


def shape_only(module: nn.Module) -> Callable[..., Any] | None:
    """A forward that returns empty tensors of the right shapes; None for modules that run as they are.

    Shapes are those of the module's parameters, which a copy has whole.
    """
    if is_a(module, "FusedLayerNorm"):
        return torch.empty_like
    if not any(c.__module__.partition(".")[0] == "transformer_engine" for c in type(module).__mro__):
        return None
    if any(is_a(module, name) for name in _LINEAR):
        return _linear(module)
    if is_a(module, "TEDotProductAttention"):
        return _attention
    return torch.empty_like if type(module).__name__ in _NORMS else None


def _linear(module: Any) -> Callable[..., Any]:
    def forward(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        bias = module.bias if module.te_return_bias else None
        return x.new_empty((*x.shape[:-1], module.weight.shape[0])), bias

    return forward


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return query.new_empty((*query.shape[:-2], query.shape[-2] * value.shape[-1]))  # [s, b, heads * width]
