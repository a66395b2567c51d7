"""``Place`` and ``Cursor``: where in the data a record begins, and where among its tokens a batch ended."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["START", "Cursor", "Place"]


@dataclass(frozen=True, slots=True)
class Place:
    """Of a record: the file's number, and its byte there (a row or an item where there are no bytes).

    ``line`` is for messages: how many lines, rows or items of the file come before it.
    """

    file: int = 0
    at: int = 0
    line: int = 0


@dataclass(frozen=True, slots=True)
class Cursor:
    """The next token that no context has. ``place`` and ``document`` are those of its block (see ``shuffle``)."""

    place: Place
    document: int
    index: int = 0  # in the block, in its shuffled order
    offset: int = 0  # in the document

    def to_list(self) -> list[int]:
        return [self.place.file, self.place.at, self.place.line, self.document, self.index, self.offset]

    @classmethod
    def from_list(cls, numbers: list[int]) -> Cursor:
        file, at, line, document, index, offset = numbers
        return cls(Place(file, at, line), document, index, offset)


START = Cursor(Place(), 0)
