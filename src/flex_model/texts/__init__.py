"""Texts, or ready tokens, as batches of contexts for a model: streamed, and resumed at any batch."""

from flex_model.texts.batch import TokenBatch
from flex_model.texts.batches import TokenBatches

__all__ = ["TokenBatch", "TokenBatches"]
