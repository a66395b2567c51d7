"""PEFT's adapters: which of their modules are wrappers, and which hold what the plain model had in that place.

A ``PeftModel`` and the tuner in it only pass on what the plain model does. An adapted layer stands in the place of the
plain one and makes its value; the plain layer is its child ``base_layer``, or ``original_module`` where a copy of the
whole layer is trained (``modules_to_save``).
"""

from __future__ import annotations

import sys

from torch import nn

__all__ = ["has_two_sets", "plain_layer", "wrapped_model"]


def wrapped_model(module: nn.Module) -> str | None:
    """The attribute under which a wrapper of PEFT's holds the model."""
    peft = sys.modules.get("peft")
    if peft is None:
        return None
    if isinstance(module, (peft.PeftModel, peft.PeftMixedModel)):
        return "base_model"
    return "model" if isinstance(module, peft.tuners.tuners_utils.BaseTuner) else None


def plain_layer(module: nn.Module) -> str | None:
    """The attribute under which an adapted layer holds the plain model's own."""
    peft = sys.modules.get("peft")
    if peft is None:
        return None
    if isinstance(module, peft.utils.other.AuxiliaryTrainingWrapper):
        return next((a for a in ("original_module", "token_adapter") if module._modules.get(a) is not None), None)
    adapted = isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)
    return "base_layer" if adapted and "base_layer" in module._modules else None


def has_two_sets(module: nn.Module) -> bool:
    """Whether the plain layer stands beside a copy that runs in its place, so that names inside are of either."""
    return plain_layer(module) == "original_module"
