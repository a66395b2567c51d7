"""``fill``: documents to contexts of one length, or to a row each."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace

from flex_model.texts.batch import IGNORED, Sheet
from flex_model.texts.place import START, Cursor

__all__ = ["Document", "Packing", "fill"]


@dataclass(frozen=True, slots=True)
class Document:
    """``ids`` (T,); ``labels`` (T,), or one for all of them; ``cursor`` is at its first token."""

    number: int
    ids: array[int]
    labels: array[int] | int | None
    cursor: Cursor

    def begun_with(self, token: int | None) -> Document:
        """With that token before its first, unless it is there."""
        if token is None or not self.ids or self.ids[0] == token:
            return self
        labels = self.labels
        if isinstance(labels, array):
            labels = array("q", [IGNORED]) + labels
        return replace(self, ids=array("q", [token]) + self.ids, labels=labels)

    def label(self, begin: int, end: int) -> array[int] | int | None:
        return self.labels[begin:end] if isinstance(self.labels, array) else self.labels

    @property
    def added_label(self) -> int | None:
        """Of a token that was put beside it."""
        return None if isinstance(self.labels, array) else self.labels


@dataclass(frozen=True, slots=True)
class Packing:
    """The rule of the contexts: token ids where something is to be added.

    context_begin: first in each context. document_begin: first in each document. separator: where a document begins
    within a context. None of them is doubled: a document that has it already keeps its own.
    """

    join: bool  # whether documents share contexts
    split: bool  # whether a document that does not fit goes on in the next
    context_begin: int | None
    document_begin: int | None
    separator: int | None


def fill(
    documents: Iterable[Document], packing: Packing, new_sheet: Callable[[], Sheet]
) -> Generator[tuple[Sheet, Cursor], None, None]:
    """Full sheets, each with the place after it, and at the end one that is not full if tokens are left."""
    sheet, end = new_sheet(), START
    before: Document | None = None  # in the row that is being filled
    for document in documents:
        document = document.begun_with(packing.document_begin)
        at = document.cursor.offset
        while at < len(document.ids):
            at = _put(sheet, document, at, before, packing)
            before = document
            if sheet.room and packing.join:
                continue
            sheet.end_row()
            before = None
            if not (packing.join or packing.split):
                at = len(document.ids)
            if sheet.full:
                yield sheet, replace(document.cursor, offset=at)
                sheet = new_sheet()
        end = replace(document.cursor, offset=at)
    if sheet.tokens:
        yield sheet, end


def _put(sheet: Sheet, document: Document, at: int, before: Document | None, packing: Packing) -> int:
    """As many of the document's tokens from ``at`` on as the row has room for; returns where they end."""
    first = document.ids[at]
    if before is None:
        if packing.context_begin not in (None, first):
            sheet.put(array("q", [packing.context_begin]), document.number, document.added_label)
    elif packing.separator not in (None, first):
        sheet.put(array("q", [packing.separator]), before.number, before.added_label)
    end = min(at + sheet.room, len(document.ids))
    sheet.put(document.ids[at:end], document.number, document.label(at, end))
    return end
