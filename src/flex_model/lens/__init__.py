"""Analyses built on the public API only."""

from flex_model.lens.induction import (
    CopyLoss,
    Head,
    Induction,
    induction_scores,
    measure,
    remove_heads,
    repeated_loss,
    repeated_tokens,
    top_heads,
)

__all__ = [
    "CopyLoss",
    "Head",
    "Induction",
    "induction_scores",
    "measure",
    "remove_heads",
    "repeated_loss",
    "repeated_tokens",
    "top_heads",
]
