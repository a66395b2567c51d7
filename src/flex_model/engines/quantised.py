"""Weights that are kept in fewer bits: what they stand for, as a plain floating tensor.

torchao's and quanto's are tensor subclasses that can tell themselves; bitsandbytes' are packed integers, whose scales
lie on the parameter or, from the first forward on, on the layer.
"""

from __future__ import annotations

import sys
from copy import copy
from typing import Any

from torch import Tensor, nn

from flex_model.errors import LayoutError

__all__ = ["dequantised"]


def dequantised(owner: nn.Module, attribute: str, full: Tensor) -> Tensor:
    """``full``, the whole of a parameter of ``owner``, in the numbers that it stands for."""
    if "bitsandbytes" in sys.modules and attribute == "weight" and not full.is_floating_point():
        return _of_bitsandbytes(owner, full)
    if full.is_quantized or type(full).dequantize is not Tensor.dequantize:
        return full.dequantize()  # type: ignore[no-untyped-call,no-any-return]
    return full


def _of_bitsandbytes(layer: nn.Module, packed: Tensor) -> Tensor:
    bnb: Any = sys.modules["bitsandbytes"]
    parameter: Any = layer._parameters["weight"]
    if isinstance(layer, bnb.nn.Linear4bit):
        state = getattr(parameter, "quant_state", None) or layer.quant_state
        if state is not None:
            if getattr(state, "packing_format_for_cpu", False):  # in evaluation, for CPUs that multiply in bfloat16
                packed, state = bnb.functional._convert_weight_packed_for_cpu_inverse(packed, copy(state))
            whole: Tensor = bnb.functional.dequantize_4bit(packed, state)
            return whole
    elif isinstance(layer, bnb.nn.Linear8bitLt):
        scales = [getattr(parameter, "SCB", None), layer.state.SCB]
        found = next((s for s in scales if s is not None), None)
        if found is not None:
            whole = bnb.functional.int8_vectorwise_dequant(packed, found)
            return whole
    else:
        return packed
    raise LayoutError(
        f"the weight of a {type(layer).__name__} is packed, and its scales are not here; call the model once, or move "
        f"it to its device first.",
        page="parameter-packed",
    )
