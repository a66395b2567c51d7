"""``Meter``: how far a harvest is: rows, GB, GB/s and the time that is left, on the first rank's terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

__all__ = ["Meter"]


class Meter:
    """``row_bytes``: of all sites together, once they are known. ``progress``: whether to show it, None for where there
    is a terminal."""

    def __init__(self, steps: int | None, *, first: bool, progress: bool | None) -> None:
        self.row_bytes = 0
        self.rows = self.steps = 0
        self._total = steps
        self._shown = first and (progress if progress is not None else sys.stderr.isatty())
        self._bar: Any = None
        self._task: Any = None
        self._started = time.perf_counter()

    @property
    def bytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def __enter__(self) -> Meter:
        if self._shown:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("first step", total=self._total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def skip(self, steps: int) -> None:
        """Steps that are in the store already."""
        if self._bar is not None:
            self._bar.update(self._task, completed=steps)

    def step(self, rows: int) -> None:
        self.rows, self.steps = self.rows + rows, self.steps + 1
        if self._bar is not None:
            self._bar.update(self._task, advance=1, description=self.words)

    @property
    def words(self) -> str:
        rate = self.bytes / max(self.seconds, 1e-9)
        return f"{self.rows:,} rows, {self.bytes / 1e9:.2f} GB, {rate / 1e9:.3f} GB/s"
