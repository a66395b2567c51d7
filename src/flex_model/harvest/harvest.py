"""``harvest``: a loader's batches through a model on any number of ranks, and what chosen sites give into a store."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flex_model.errors import FlexModelError, HarvestError
from flex_model.harvest.loader import Loader, about_run, check_same
from flex_model.harvest.meter import Meter
from flex_model.harvest.run import Asked, Run
from flex_model.harvest.writing import Writing
from flex_model.store import ActivationStore, StoredSite

if TYPE_CHECKING:
    from flex_model.core.flex_model import FlexModel

__all__ = ["Harvested", "harvest"]

_MEETING = 64  # steps after which ranks tell one another of failures, at the latest
_COMMIT_SECONDS, _COMMIT_BYTES = 30.0, 2**30  # of a rank's work between two commits


@dataclass(frozen=True, slots=True)
class Harvested:
    """What ``fm.harvest`` has written: steps, rows and bytes of this run, on all ranks together."""

    path: str
    sites: dict[str, StoredSite]
    steps: int
    rows: int
    bytes: int
    seconds: float

    @property
    def store(self) -> ActivationStore:
        return ActivationStore(self.path)

    def __str__(self) -> str:
        rate = self.bytes / max(self.seconds, 1e-9)
        return (
            f"{self.rows:,} rows of {len(self.sites)} sites, {self.bytes / 1e9:.2f} GB, in {self.seconds:.1f} s "
            f"({rate / 1e9:.3f} GB/s), in {self.path}"
        )


def harvest(
    fm: FlexModel,
    batches: Iterable[Any],
    path: str | Path,
    *,
    job: Asked,
    forward: Callable[..., Any] | None,
    resume: bool,
    progress: bool | None,
    queue_bytes: int,
    segment_bytes: int,
) -> Harvested:
    """See ``FlexModel.harvest``."""
    run = Run(fm, job, forward)
    writing = Writing(path, run.together, queue_bytes=queue_bytes, segment_bytes=segment_bytes)
    about = about_run(fm, batches, job)
    begun = writing.look(resume=resume)
    run.together.each(lambda: check_same(str(path), begun, about), "the look at the store")
    first = begun.next_step if begun is not None else 0
    loader = Loader(batches, own=job.own_batches)
    meter = Meter(loader.total, first=run.together.is_main, progress=progress)
    try:
        with meter, run.hooked():
            meter.skip(first)
            loop = _Loop(run, writing, meter, {**about, "steps": loader.total}, new=begun is None)
            loop.go(loader, first, begun.place if begun is not None else None)
    except BaseException:
        writing.drop()
        raise
    size = loop.rows * meter.row_bytes
    return Harvested(str(path), run.sites or writing.sites, meter.steps, loop.rows, size, meter.seconds)


class _Loop:
    """The steps of a harvest, from the first that is not in the store."""

    def __init__(self, run: Run, writing: Writing, meter: Meter, about: dict[str, Any], *, new: bool) -> None:
        self.run, self.writing, self.meter, self.about, self.new = run, writing, meter, about, new
        self._every = run.job.commit_every
        self.rows = 0  # whose side columns this rank has written; at the end, of all ranks
        self._since = 0  # steps since the last commit
        self._error: FlexModelError | None = None

    def go(self, loader: Loader, first: int, place: Any) -> None:
        number = first - 1
        for number, (given, idle) in enumerate(self._together(loader.batches(first, place)), first):
            self.step(number, given, loader, idle=idle)
        if self.meter.steps:
            self.meet()
            if self._since:
                self.writing.commit(number, loader.place())
            self.writing.finish()
        self.rows = sum(self.run.together.tell(self.rows, "the end of the harvest"))

    def _together(self, batches: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
        """Batches, as long as any rank has one; a rank that has no more runs its last again, for the others."""
        if not self.run.job.own_batches or self.run.together.ranks == 1:
            yield from ((given, False) for given in batches)
            return
        last = None
        while True:
            given = next(batches, None)
            here = self.run.together.tell(given is not None, "the next batch")
            if not any(here):
                return
            if given is None and last is None:
                raise HarvestError(
                    "own_batches=True: this rank's loader has no batch at all, and cannot run beside the others; give "
                    "each rank one.",
                    page="harvest-batch",
                )
            last = given if given is not None else last
            yield last, given is None

    def step(self, number: int, given: Any, loader: Loader, *, idle: bool) -> None:
        started = time.perf_counter()
        whole, mine = self.run.batch(given, loader.contexts)
        loader.took(len(whole.keep))
        mine = mine.without_rows() if idle else mine
        self.run.step(number, mine)
        if not self.meter.steps:
            self._open()
        columns, parts = self.run.beside(mine)
        step = self.run.taking.end()
        try:
            if self._error is None:
                self.writing.put(step, columns, parts)
        except FlexModelError as error:  # told when ranks meet: the others may be in a forward
            self._error = error
        self._since += 1
        self.rows += sum(count for _, count in parts)
        self.meter.step(int(whole.keep.sum()))
        self._pause(number, loader, time.perf_counter() - started)

    def _open(self) -> None:
        run = self.run
        self.writing.open(run.sites, run.columns, self.about, new=self.new)
        run.taking.memory = self.writing.memory
        self.meter.row_bytes = sum(site.row_bytes for site in run.sites.values())

    def _pause(self, number: int, loader: Loader, seconds: float) -> None:
        """Commit, or at least hear of one another, now and then."""
        done = self.meter.steps
        if done == 2 and self._every is None:
            self._every = self._steps_a_commit(seconds)
        if self._every is not None and self._since >= self._every:
            self.meet()
            self.writing.commit(number, loader.place())
            self._since = 0
        elif self.run.together.ranks == 1 or done % _MEETING == 0 or done & (done - 1) == 0:
            self.meet()

    def _steps_a_commit(self, seconds: float) -> int:
        """As many as the main rank's last step says; the same on all."""
        together = self.run.together
        most = max(together.tell(self.writing.bytes // self.meter.steps, "the size of a commit"))
        steps = min(_COMMIT_SECONDS / max(seconds, 1e-6), _COMMIT_BYTES / max(most, 1))
        return together.on_main(lambda: max(1, int(steps)), "the size of a commit")

    def meet(self) -> None:
        """All that failed on any rank is raised on all."""
        self.writing.settle(wait=False)
        if self.run.together.ranks > 1:
            self.run.runtime.outbox.flush()
        self.run.together.each(self._raise, "a meeting of the harvest")

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
        self.run.raise_failure()
