"""``Index``: where every row of every site lies, as sorted arrays of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flex_model.store.commits import Commit
from flex_model.store.segment import Segment

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

__all__ = ["Index", "Lane"]


@dataclass(frozen=True, slots=True)
class Lane:
    """Columns of a site that were written together; ``start`` and ``count`` are of the store's rows, sorted."""

    columns: tuple[int, int]
    start: Ints
    count: Ints
    segment: Ints
    first: Ints

    def find(self, rows: Ints) -> tuple[Ints, Ints, Ints]:
        """Of those ``rows`` that lie here: their places in ``rows``, their segments, and their rows in these."""
        import numpy as np

        run = np.searchsorted(self.start, rows, side="right") - 1
        inside = (run >= 0) & (rows < self.start[run] + self.count[run])
        run = run[inside]
        return np.flatnonzero(inside), self.segment[run], self.first[run] + rows[inside] - self.start[run]


@dataclass(frozen=True, slots=True)
class Index:
    """``segments`` of all commits; ``parts`` is a row a part of a step: step, part, first row, rows."""

    segments: list[Segment]
    parts: Ints
    lanes: dict[str, list[Lane]]

    @property
    def rows(self) -> int:
        return int(self.parts[-1, 2:].sum()) if len(self.parts) else 0

    @classmethod
    def of(cls, commits: Sequence[Commit]) -> Index:
        import numpy as np

        whole = Commit(-1)
        for commit in commits:
            whole.add(commit)
        runs = np.array(whole.runs, np.int64).reshape(-1, 5)  # segment, step, part, first, count
        places, of_run = np.unique(runs[:, 1:3], axis=0, return_inverse=True)  # sorted by step, then by part
        of_run = of_run.reshape(-1)
        counts = np.zeros(len(places), np.int64)
        counts[of_run] = runs[:, 4]
        starts = np.cumsum(counts) - counts
        keys: dict[tuple[str, int, int], int] = {}
        of_segment = [keys.setdefault((s.site, s.start, s.stop), len(keys)) for s in whole.segments]
        of_lane = np.array(of_segment, np.int64)[runs[:, 0]]
        order = np.lexsort((starts[of_run], of_lane))
        bounds = np.searchsorted(of_lane[order], np.arange(len(keys) + 1))
        lanes: dict[str, list[Lane]] = {}
        for (site, start, stop), number in keys.items():
            mine = order[bounds[number] : bounds[number + 1]]
            segment, _, _, first, count = runs[mine].T
            lanes.setdefault(site, []).append(Lane((start, stop), starts[of_run[mine]], count, segment, first))
        return cls(whole.segments, np.column_stack([places, starts, counts]), lanes)
