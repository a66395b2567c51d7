"""``Contexts``: which rows of a store make whole contexts of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flex_model.errors import StoreError
from flex_model.store.export.selection import Rows
from flex_model.store.reader import ActivationStore

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

__all__ = ["Contexts", "Windows"]

_ROWS = 1 << 18  # whose positions are in memory at once


@dataclass(frozen=True, slots=True)
class Contexts:
    """Positions ``start`` to ``start + size - 1`` of every context that has a row for each of them.

    A context ends where the next row of the store is not its next position: it is of another step, of another document
    (contexts that are ``packed`` hold several), or has another number in the column ``contexts``, if there is one.
    """

    store: ActivationStore
    rows: Rows = field(repr=False)
    size: int
    start: int = 0
    packed: bool = False

    def __post_init__(self) -> None:
        if self.size < 1 or self.start < 0:
            raise StoreError(
                f"expected a context_size from 1 and a start from 0, got {self.size} and {self.start}.",
                page="bad-argument",
            )
        if "positions" not in self.store.columns:
            raise StoreError(
                f"contexts need the column 'positions' (the place of each row in its context); the store has "
                f"{', '.join(self.store.columns) or 'no columns'}.",
                page="export-contexts",
            )

    def count(self, *, drop: bool) -> int:
        """Of whole contexts. Raises StoreError where there is none, or rows of others and not ``drop``."""
        whole = part = 0
        for runs in self._runs():
            inside = self._inside(runs)
            whole += int((inside == self.size).sum())
            part += int(inside[inside < self.size].sum())
        if not whole or (part and not drop):
            ways = ["leave them out with incomplete='drop'"] if whole else []
            ways += ["say packed=True if contexts hold several documents"] if self._documents else []
            raise StoreError(
                f"{part} of {len(self.rows)} rows are in contexts without a row for each position from {self.start} to "
                f"{self.start + self.size - 1}, and {whole} contexts are whole; "
                f"{', or '.join([*ways, 'give another context_size or start'])}.",
                page="export-contexts",
            )
        return whole

    def windows(self) -> Iterator[Ints]:
        """The first rows of whole contexts, in order, a bounded number at a time."""
        for runs in self._runs():
            row, position, _ = runs[self._inside(runs) == self.size].T
            yield row + self.start - position

    def _inside(self, runs: Ints) -> Ints:
        """How many rows of each run are at positions that go out."""
        import numpy as np

        _, position, count = runs.T
        first, stop = np.maximum(position, self.start), np.minimum(position + count, self.start + self.size)
        inside: Ints = np.maximum(stop - first, 0)
        return inside

    def _runs(self) -> Iterator[Ints]:
        """``(runs, 3)``: first row, its position, and how many rows and positions follow one another from there."""
        import numpy as np

        held = np.empty((0, 3), np.int64)  # the last run, which may go on in the next piece
        for at in range(0, len(self.rows), _ROWS):
            rows = np.asarray(self.rows[max(0, at - 1) : at + _ROWS])
            positions = self.store.columns["positions"][rows].astype(np.int64)
            begins = np.flatnonzero(np.append(at == 0, ~self._follows(rows, positions)))
            if len(held):
                held[0, 2] += (begins[0] if len(begins) else len(rows)) - 1
            counts = np.diff(np.append(begins, len(rows)))
            runs = np.concatenate([held, np.column_stack([rows[begins], positions[begins], counts])])
            yield runs[:-1]
            held = runs[-1:]
        yield held

    def _follows(self, rows: Ints, positions: Ints) -> NDArray[np.bool_]:
        """Of each row but the first: whether it goes on with the context of the one before."""
        import numpy as np

        parts = self.store._index.parts  # step, part, first row, rows
        steps = parts[np.append(True, np.diff(parts[:, 0]) != 0), 2]
        follows: NDArray[np.bool_] = (np.diff(rows) == 1) & (np.diff(positions) == 1)
        follows &= ~np.isin(rows[1:], steps)
        for name in ["contexts", *self._documents]:
            if name in self.store.columns:
                numbers = self.store.columns[name][rows]
                follows &= numbers[1:] == numbers[:-1]
        return follows

    @property
    def _documents(self) -> list[str]:
        return ["documents"] if "documents" in self.store.columns and not self.packed else []


class Windows:
    """First rows of contexts, taken some at a time."""

    def __init__(self, contexts: Contexts) -> None:
        self._found = contexts.windows()
        self._held: list[Ints] = []

    def take(self, count: int) -> Ints:
        import numpy as np

        while sum(map(len, self._held)) < count:
            self._held.append(next(self._found))
        joined = np.concatenate(self._held)
        self._held = [joined[count:]]
        return joined[:count]
