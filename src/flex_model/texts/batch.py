"""``TokenBatch``: contexts, and where each of their tokens comes from; ``Sheet``: one that is being filled."""

from __future__ import annotations

from array import array
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
    """The rows of one batch, filled one after the other. In arrays, for tensors are slow in small pieces."""

    def __init__(self, rows: int, width: int, *, pad: int, labelled: bool) -> None:
        self.tokens = 0
        self._rows, self._width, self._pad = rows, width, pad
        self._lengths: list[int] = []  # of the rows that were ended
        self._length = 0  # of the row that is being filled
        self._ids, self._documents = array("q"), array("q")
        self._labels = array("q") if labelled else None

    @property
    def room(self) -> int:
        """In the row that is being filled."""
        return self._width - self._length

    @property
    def full(self) -> bool:
        """Whether the last row was ended."""
        return len(self._lengths) == self._rows

    def put(self, ids: array[int], document: int, labels: array[int] | int | None) -> None:
        self._add(ids, document, labels)
        self._length += len(ids)
        self.tokens += len(ids)

    def _add(self, ids: array[int], document: int, labels: array[int] | int | None) -> None:
        self._ids.extend(ids)
        self._documents.extend(array("q", [document]) * len(ids))
        if self._labels is not None:
            one = IGNORED if labels is None else labels
            self._labels.extend(array("q", [one]) * len(ids) if isinstance(one, int) else one)

    def end_row(self) -> None:
        self._add(array("q", [self._pad]) * self.room, -1, None)
        self._lengths.append(self._length)
        self._length = 0

    def batch(self, number: int, *, excluded: Tensor, whole_width: bool) -> TokenBatch:
        """Of the rows with tokens; as wide as the longest unless ``whole_width``."""
        if self._length:
            self.end_row()
        lengths = torch.tensor(self._lengths)
        width = self._width if whole_width else int(lengths.max())
        positions = torch.arange(width).repeat(len(lengths), 1)
        mask = positions < lengths[:, None]
        ids = self._tensor(self._ids, width)
        labels = None if self._labels is None else self._tensor(self._labels, width)
        keep = mask & ~torch.isin(ids, excluded) if len(excluded) else mask
        return TokenBatch(number, ids, mask.long(), self._tensor(self._documents, width), positions, keep, labels)

    def _tensor(self, flat: array[int], width: int) -> Tensor:
        return torch.frombuffer(flat, dtype=torch.int64).view(-1, self._width)[:, :width].contiguous()
