"""What an analysis runs the model on: its keywords, or token ids alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["Inputs", "keywords"]

Inputs = Tensor | Mapping[str, Any]


def keywords(inputs: Inputs) -> Mapping[str, Any]:
    """Token ids (B, S) are ``input_ids``."""
    return {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs
