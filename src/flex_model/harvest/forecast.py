"""``Forecast``: what a harvest would write, and how long it would take, from its first batches; nothing is written."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rich.table import Table

from flex_model.errors import HarvestError
from flex_model.harvest.loader import Loader
from flex_model.harvest.run import Run
from flex_model.store import StoredSite

__all__ = ["Forecast", "forecast"]

_TIMED = 3  # batches, of which the first finds the layouts


@dataclass(frozen=True, slots=True)
class Forecast:
    """``steps`` and what follows from it are None where the loader does not know how many batches it has. ``rows``:
    by the first batches; ``seconds``: of forwards on this machine, if the disk can follow; ``free``: bytes left where
    the store would be, None for a bucket."""

    sites: dict[str, StoredSite]
    steps: int | None
    rows_a_step: float
    seconds_a_step: float
    free: int | None

    @property
    def row_bytes(self) -> int:
        return sum(site.row_bytes for site in self.sites.values())

    @property
    def rows(self) -> int | None:
        return None if self.steps is None else round(self.steps * self.rows_a_step)

    @property
    def bytes(self) -> int | None:
        return None if self.rows is None else self.rows * self.row_bytes

    @property
    def seconds(self) -> float | None:
        return None if self.steps is None else self.steps * self.seconds_a_step

    @property
    def fits(self) -> bool | None:
        """Whether there is room; None where that is not known."""
        return None if self.bytes is None or self.free is None else self.bytes <= self.free

    def table(self) -> Table:
        table = Table("site", "a row", "dtype", "bytes a row", "GB in all")
        for name, site in self.sites.items():
            whole = "?" if self.rows is None else f"{site.row_bytes * self.rows / 1e9:.3f}"
            table.add_row(name, " x ".join(map(str, site.shape)), str(site.dtype), f"{site.row_bytes:,}", whole)
        return table

    def __str__(self) -> str:
        rate = self.rows_a_step / max(self.seconds_a_step, 1e-9)
        speed = f"{rate:,.0f} rows/s, {rate * self.row_bytes / 1e9:.3f} GB/s"
        if self.rows is None or self.bytes is None or self.seconds is None:
            return f"{self.row_bytes:,} bytes a row of {len(self.sites)} sites, at {speed}; how many rows is not known"
        short = ", which is not enough" if self.fits is False else ""
        room = "" if self.free is None else f"; {self.free / 1e9:.1f} GB are free{short}"
        return (
            f"{self.rows:,} rows of {len(self.sites)} sites, {self.bytes / 1e9:.2f} GB, in about {self.seconds:,.0f} s "
            f"({speed}){room}"
        )


def forecast(run: Run, loader: Loader, path: str | Path) -> Forecast:
    """All ranks."""
    rows: list[int] = []
    seconds: list[float] = []
    with run.hooked():
        for number, given in enumerate(islice(loader.batches(0), _TIMED)):
            started = time.perf_counter()
            whole, mine = run.batch(given, loader.contexts)
            run.step(number, mine)
            run.taking.end().ready()
            rows.append(int(whole.keep.sum()))
            seconds.append(time.perf_counter() - started)
            run.meet()
    if not rows:
        raise HarvestError("there are no batches; give a loader that has some.", page="harvest-batch")
    dealers = run.dealers if run.job.own_batches else 1
    return Forecast(
        run.sites, loader.total, dealers * sum(rows) / len(rows), min(seconds[1:] or seconds), _room(str(path))
    )


def _room(path: str) -> int | None:
    if "://" in path:
        return None
    there = Path(path).absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free
