"""``Reading``: a source's records as documents with token ids, from any cursor on."""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from flex_model.errors import DataError
from flex_model.texts.encoder import Encoder
from flex_model.texts.packing import Document
from flex_model.texts.place import Cursor, Place
from flex_model.texts.record import Form
from flex_model.texts.source import Source

__all__ = ["Reading"]

# Tokenised at once, for fast tokenizers are parallel; the first group is small, so that the first batch comes soon.
_CHARACTERS = 1 << 14, 1 << 20
_TEXTS = 1024


@dataclass(frozen=True, slots=True)
class _Read:
    """A record that was read: its text or its tokens."""

    number: int
    value: str | array[int]
    labels: array[int] | int | None
    cursor: Cursor
    place: Place


@dataclass(frozen=True, slots=True)
class Reading:
    source: Source
    form: Form
    encoder: Encoder | None
    shuffle: int  # documents in a block; 1 keeps their order
    seed: int

    def documents(self, start: Cursor) -> Iterator[Document]:
        group: list[_Read] = []
        characters, limit = 0, _CHARACTERS[0]
        try:
            for read in self._records(start):
                group.append(read)
                characters += len(read.value)
                if characters >= limit or len(group) >= _TEXTS:
                    yield from self._encoded(group)
                    group, characters, limit = [], 0, min(2 * limit, _CHARACTERS[1])
        except DataError:  # after the documents before it
            yield from self._encoded(group)
            raise
        yield from self._encoded(group)

    def _records(self, start: Cursor) -> Iterator[_Read]:
        """In blocks: one is shuffled by the seed and its first number alone, so that any can be read again."""
        records = self.source.records(start.place, self.form.wanted())
        first, skip, offset = start.document, start.index, start.offset
        while block := list(itertools.islice(records, self.shuffle)):
            order = list(range(len(block)))
            if self.shuffle > 1:
                random.Random(f"{self.seed} {first}").shuffle(order)
            for index in range(skip, len(block)):
                place, record = block[order[index]]
                cursor = Cursor(block[0][0], first, index, offset)
                value, labels = self.form.read(record, partial(self.source.tell, place))
                yield _Read(first + order[index], value, labels, cursor, place)
                offset = 0
            first, skip = first + len(block), 0

    def _encoded(self, group: list[_Read]) -> Iterator[Document]:
        rows: Iterable[array[int]]
        if self.encoder is None or self.form.kind == "tokens":
            rows = [read.value for read in group if isinstance(read.value, array)]
        else:
            try:
                rows = self.encoder.encode([str(read.value) for read in group])
            except (TypeError, ValueError):
                rows = self._one_by_one(self.encoder, group)
        for read, ids in zip(group, rows, strict=True):
            yield Document(read.number, ids, read.labels, read.cursor)

    def _one_by_one(self, encoder: Encoder, group: list[_Read]) -> Iterator[array[int]]:
        """To find the text that a tokenizer refuses."""
        for read in group:
            try:
                yield encoder.encode([str(read.value)])[0]
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"{self.source.tell(read.place)}: expected a text in Unicode, found one that {encoder.name} cannot "
                    f"read ({str(error).partition(chr(10))[0][:80].rstrip('.')})."
                ) from error
