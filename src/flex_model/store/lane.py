"""``Lane``: some columns of one site on their way to disk, from one commit to the next."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor

from flex_model.store.commits import Run
from flex_model.store.dtypes import as_torch, numpy_dtype
from flex_model.store.moments import Sums
from flex_model.store.place import Place, telling
from flex_model.store.segment import Segment, SegmentWriter

__all__ = ["Folders", "Lane", "LaneKey"]

LaneKey: TypeAlias = tuple[str, int, int]  # site, first column, column after the last


class Folders:
    """Names of new segments, for any thread; ``root`` is one of a session and a rank, so that no other has the same."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._numbers = itertools.count()

    def new(self, site: str) -> str:
        name = re.sub(r"[^\w.-]", "_", site, flags=re.ASCII)[:80]
        return f"{self._root}/{next(self._numbers):06d}-{name}"


class Lane:
    """``append`` and ``close`` work one after another in the queue, and so does ``add_up``; the rest is read after."""

    def __init__(
        self, place: Place, key: LaneKey, dtype: str, *, folders: Folders, segment_bytes: int, moments: bool
    ) -> None:
        self._place, self._key, self._dtype = place, key, dtype
        self._folders, self._segment_bytes = folders, segment_bytes
        self._open: SegmentWriter | None = None
        self.segments: list[Segment] = []
        self.runs: list[Run] = []
        self.sums = Sums(key[2] - key[1]) if moments else None

    def append(self, step: int, parts: Sequence[tuple[int, int]], data: Any) -> None:
        """Bytes of rows, ``(rows, row bytes)``; ``parts``: which parts of the step they are, and their numbers."""
        name, start, stop = self._key
        with telling(f"{self._place} cannot be written"):
            if self._open is None:
                folder = self._folders.new(name)
                self._open = SegmentWriter(self._place, folder, site=name, dtype=self._dtype, columns=(start, stop))
            first = self._open.rows
            for part, count in parts:
                self.runs.append(Run(len(self.segments), step, part, first, count))
                first += count
            self._open.append(data)
            if self._open.bytes >= self._segment_bytes:
                self.close()

    def add_up(self, data: Any, sums: Tensor | None) -> None:
        """The same bytes, for the statistics, or what was summed already; beside ``append``, if in order."""
        if self.sums is None:
            return
        if sums is not None:
            self.sums.take(len(data), sums)
        else:
            self.sums.add(as_torch(data.view(numpy_dtype(self._dtype)), self._dtype))

    def close(self) -> None:
        """End the open segment."""
        if self._open is not None:
            with telling(f"{self._place} cannot be written"):
                self.segments.append(self._open.close())
            self._open = None

    def drop(self) -> None:
        """Let the open segment go unfinished, and its room on the disk with it when it is removed."""
        if self._open is not None:
            self._open.drop()
        self._open = None
