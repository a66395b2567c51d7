"""Which tokens of a batch count: those that are not padding, or some of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flex_model import FlexModel, FlexModelError

__all__ = ["chosen_rows", "whole_mask"]


def whole_mask(fm: FlexModel, mask: Any) -> Tensor | None:
    """(B, S) of the whole batch; collective."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        found = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise FlexModelError(f"attention_mask: expected a tensor (B, S), found {found}.", page="bad-argument")
    full: Tensor = fm.full_batch(mask)
    return full


def chosen_rows(residual: Tensor, mask: Tensor | None, tokens: int | None, seed: int) -> Tensor:
    """Places in ``residual.flatten(0, 1)`` of tokens that are not padding; ``tokens`` of them, drawn with ``seed``."""
    shape = tuple(residual.shape[:2])
    if mask is not None and tuple(mask.shape) != shape:
        raise FlexModelError(
            f"the attention_mask has the shape {tuple(mask.shape)} and the residuals {shape}; give that of this batch.",
            page="bad-argument",
        )
    real = torch.arange(shape[0] * shape[1]) if mask is None else mask.flatten().cpu().nonzero().flatten()
    if not len(real):
        raise FlexModelError(
            "a batch of a tuned lens has no token that is not padding; leave it out.", page="bad-argument"
        )
    if tokens is not None and tokens < len(real):
        generator = torch.Generator().manual_seed(seed)
        real = real[torch.randperm(len(real), generator=generator)[:tokens].sort().values]
    return real.to(residual.device)
