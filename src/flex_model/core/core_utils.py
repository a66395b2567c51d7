"""``DummyModule``: a place to hook where a model has none."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

__all__ = ["DummyModule"]

T = TypeVar("T")


class DummyModule(nn.Module):
    """An identity module. Put it where a value should be hookable that no module returns.

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.attention_scores = DummyModule()
    ...     def forward(self, q, k):
    ...         return self.attention_scores(q @ k.transpose(-1, -2)).softmax(-1)
    """

    def forward(self, inputs: T) -> T:
        return inputs
