"""``TokenBatch``: contexts, and where each of their tokens comes from; ``Sheet``: one that is being filled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["IGNORED", "Sheet", "TokenBatch"]

IGNORED = -100  # what torch's losses pass over


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Tokens for one forward, ``fm(**batch.inputs)``. All but ``number`` are (B, S).

    number: of the batch, from 0.
    input_ids: int64, padded on the right.
    attention_mask: int64, 1 for a token and 0 for padding.
    documents: int64, the number of each token's document in the order of the data; -1 for padding. A BOS belongs to
        the document that follows it, a separator to the one that it ends.
    positions: int64, places in the context.
    keep: bool, the tokens whose activations are wanted: neither padding nor excluded.
    labels: int64, of each token's document or of the token itself; -100 for padding, and where tokens have labels
        of their own for those that were added. None without ``label_field``.
    """

    number: int
    input_ids: Tensor
    attention_mask: Tensor
    documents: Tensor
    positions: Tensor
    keep: Tensor
    labels: Tensor | None = None

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The model's keywords."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}


class Sheet:
    """The rows of one batch, filled from the left, one after the other."""

    def __init__(self, rows: int, width: int, *, pad: int, labelled: bool) -> None:
        self.rows, self.width = rows, width
        self.lengths = [0]  # of the rows that were begun
        self._ids = torch.full((rows, width), pad)
        self._documents = torch.full((rows, width), -1)
        self._labels = torch.full((rows, width), IGNORED) if labelled else None

    @property
    def room(self) -> int:
        """In the row that is being filled."""
        return self.width - self.lengths[-1]

    @property
    def full(self) -> bool:
        """Whether the last row was ended."""
        return len(self.lengths) > self.rows

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def put(self, ids: Tensor | int, count: int, document: int, labels: Tensor | int | None) -> None:
        row, begin = len(self.lengths) - 1, self.lengths[-1]
        end = begin + count
        self._ids[row, begin:end] = ids
        self._documents[row, begin:end] = document
        if self._labels is not None and labels is not None:
            self._labels[row, begin:end] = labels
        self.lengths[-1] = end

    def end_row(self) -> None:
        self.lengths.append(0)

    def batch(self, number: int, *, excluded: Tensor, whole_width: bool) -> TokenBatch:
        """Of the rows with tokens; as wide as the longest unless ``whole_width``."""
        lengths = torch.tensor([n for n in self.lengths if n])
        rows, width = len(lengths), self.width if whole_width else int(lengths.max())
        positions = torch.arange(width).repeat(rows, 1)
        mask = positions < lengths[:, None]
        ids = self._ids[:rows, :width].contiguous()
        labels = None if self._labels is None else self._labels[:rows, :width].contiguous()
        keep = mask & ~torch.isin(ids, excluded) if len(excluded) else mask
        documents = self._documents[:rows, :width].contiguous()
        return TokenBatch(number, ids, mask.long(), documents, positions, keep, labels)
