"""Whether all ranks come with the same, asked through the store: ranks that differ never meet in a collective."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import timedelta

from flex_model.errors import FlexModelError
from flex_model.routing.watch import Failure, Watch

__all__ = ["roll_call"]

_PLACE = "the comparison of hooks"
_STEP = timedelta(seconds=0.5)
_OTHERS = 3.0  # seconds that ranks which differ have to say how


def roll_call(watch: Watch, mark: str, lines: Sequence[str]) -> None:
    """Wait until every rank has come with ``mark``. Raises MismatchError, naming the first of ``lines`` that differs,
    or PeerError with the ranks that have not come within the timeout."""
    with watch.at(_PLACE):
        _Call(watch, mark, lines).run()


class _Call:
    def __init__(self, watch: Watch, mark: str, lines: Sequence[str]) -> None:
        self.watch, self.mark, self.lines = watch, mark, list(lines)
        self.others = [r for r in watch.ranks if r != watch.rank]
        self.key = f"hooks/{watch.epoch}"

    def run(self) -> None:
        watch, store = self.watch, self.watch.store
        all_here = f"{self.key}/all/{self.mark}"
        store.set(self._of(watch.rank), self.mark)
        if store.add(f"{self.key}/count/{self.mark}", 1) == len(watch.ranks):
            store.set(all_here, "1")
            return
        deadline = time.monotonic() + watch.timeout.total_seconds()
        step, steps = _STEP, 0
        while True:
            try:
                store.wait([all_here], step)
                return
            except RuntimeError:  # not yet
                pass
            steps += 1
            self._look(time.monotonic() > deadline, ask=steps % 4 == 0)
            step = min(step * 2, timedelta(seconds=4))

    def _look(self, late: bool, *, ask: bool) -> None:
        failure = self.watch.posted()
        if failure is not None:
            self._say_lines()
            raise self.watch.end(failure, _PLACE)
        different = self._different()
        if different is not None:
            raise self._end("mismatch", self._difference(different))
        if late:
            raise self._end("absent", self._absent())
        if ask and (text := self._elsewhere()):
            raise self._end("mismatch", text)

    def _end(self, kind: str, text: str) -> FlexModelError:
        watch = self.watch
        return watch.end(watch._post(Failure(kind, watch.rank, _PLACE, watch.call, text)), _PLACE)

    def _of(self, rank: int) -> str:
        return f"{self.key}/of/{rank}"

    def _different(self) -> int | None:
        """A rank that waits for others to come with another mark."""
        store = self.watch.store
        for rank in self.others:
            if not store.check([self._of(rank)]):
                continue
            theirs = store.get(self._of(rank)).decode()
            if theirs != self.mark and not store.check([f"{self.key}/all/{theirs}"]):
                return rank
        return None

    def _say_lines(self) -> None:
        self.watch.store.set(f"{self.key}/lines/{self.watch.rank}", json.dumps(self.lines))

    def _difference(self, rank: int) -> str:
        """Where this rank's hooks and another's part."""
        self._say_lines()
        store, key = self.watch.store, f"{self.key}/lines/{rank}"
        deadline = time.monotonic() + _OTHERS
        while not store.check([key]) and time.monotonic() < deadline:
            time.sleep(0.05)
        theirs = json.loads(store.get(key)) if store.check([key]) else None
        if theirs is None:
            return f"rank {self.watch.rank} has other hooks than rank {rank}; every rank must register the same."
        return _parting(self.lines, theirs, self.watch.rank, rank)

    def _absent(self) -> str:
        store = self.watch.store
        missing = [
            r for r in self.others if not store.check([self._of(r)]) or store.get(self._of(r)).decode() != self.mark
        ]
        beats = self.watch.ask()
        told = []
        for rank in missing[:8]:
            beat, alive = beats.get(rank, (None, False))
            where = "has no hooks on" if beat is None else f"last passed {beat.passed or 'no site'}"
            told.append(f"rank {rank} {'is alive and ' if alive else ''}{where}")
        more = f"; and {len(missing) - 8} more" if len(missing) > 8 else ""
        return (
            f"rank {self.watch.rank} has waited {self.watch.timeout.total_seconds():g} s with {self._hooks} for ranks "
            f"{missing} to have the same: {'; '.join(told)}{more}. Registering, and entering capture, edit and groups, "
            f"is for all ranks."
        )

    @property
    def _hooks(self) -> str:
        return f"{len(self.lines)} hooks ({'; '.join(self.lines[:3])}{'; ...' if len(self.lines) > 3 else ''})"

    def _elsewhere(self) -> str:
        """A rank that waits in a collective of this model with the hooks it had before, and goes on waiting."""
        waits = self._waiting()
        if not waits:
            return ""
        time.sleep(1)
        stuck = [rank for rank, entered in self._waiting().items() if waits.get(rank) == entered]
        if not stuck:
            return ""
        return (
            f"rank {self.watch.rank} comes with {self._hooks}, which rank {stuck[0][0]} does not have: it waits at "
            f"{stuck[0][1]}. Every rank must register the same hooks in the same order."
        )

    def _waiting(self) -> dict[tuple[int, str], int]:
        beats = {rank: beat for rank, (beat, _) in self.watch.ask().items() if beat is not None}
        return {
            (rank, b.place): b.entered
            for rank, b in beats.items()
            if b.epoch == self.watch.epoch and b.place not in ("", _PLACE)
        }


def _parting(mine: Sequence[str], theirs: Sequence[str], me: int, other: int) -> str:
    end = "every rank must register the same hooks in the same order."
    if sorted(mine) == sorted(theirs):
        place = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
        return f"hook {place} is {mine[place]} on rank {me} and {theirs[place]} on rank {other}: {end}"
    extra, missing = [x for x in mine if x not in theirs], [x for x in theirs if x not in mine]
    if extra and missing:
        return f"rank {me} has {extra[0]} where rank {other} has {missing[0]}: {end}"
    rank, without, lines = (me, other, extra) if extra else (other, me, missing)
    if not lines:
        return f"rank {me} has {len(mine)} hooks and rank {other} {len(theirs)}, some of them twice: {end}"
    return f"rank {rank} has {lines[0]}, and rank {without} does not: {end}"
