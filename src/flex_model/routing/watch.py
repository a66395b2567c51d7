"""``Watch``: what ranks tell one another outside of collectives: that they failed, and how far they are.

A rank that fails says so in the store, and then leaves the library's groups. That closes its connections, so that ranks
which wait for it in a collective are woken at once, read what it said, and raise. A rank that says nothing is asked: a
thread of each process answers, whatever its main thread does, and who does not answer is gone.

After a failure every rank makes its groups anew: failures count epochs, and what an epoch's groups hold is forgotten.
"""

from __future__ import annotations

import json
import logging
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any
from zlib import crc32

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from flex_model.errors import FlexModelError, MismatchError, PeerError, summary
from flex_model.routing.pulse import PERIOD, pulse

__all__ = ["Failure", "NoWatch", "Watch", "mark_shared", "wait"]

logger = logging.getLogger(__name__)
_OF_RANKS = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|[Tt]imed out|Broken pipe|Socket|process group")
_ANSWER = 3.0  # seconds that a living process has to answer in; its thread looks every PERIOD
_PATIENCE = timedelta(seconds=0.5)
_LONG = 10.0  # seconds of waiting after which it is said for whom
_count: Counter[tuple[int, ...]] = Counter()


@dataclass(frozen=True)
class Failure:
    """What ended an epoch: one rank's exception, ranks that did not come, or ranks that do different things."""

    kind: str  # "error" | "absent" | "mismatch"
    rank: int  # that says so
    place: str
    call: int
    text: str
    traceback: str = ""

    def on(self, rank: int, place: str) -> FlexModelError:
        """The error that ``rank`` raises, which waits, or comes, at ``place``."""
        if self.kind == "mismatch":
            return MismatchError(self.text)
        if self.kind == "absent":
            told = "" if self.rank == rank else f" (so found rank {self.rank})"
            return PeerError(f"{self.text}{told}")
        at = f" at {self.place}" if self.place else ""
        return PeerError(
            f"rank {self.rank} failed{at} in call {self.call} with {self.text}; rank {rank} cannot go on from "
            f"{place} without it, and caches, buffers and gradients of this call are undefined.\n{self.traceback}"
        )


@dataclass(frozen=True)
class _Beat:
    """How far a rank is. ``place``: where it talks to other ranks just now."""

    asked: int
    epoch: int
    entered: int
    place: str
    passed: str
    call: int


class Watch:
    """One model's watch on one rank. ``leave`` drops this rank's groups; ``at(place)`` is around every collective."""

    def __init__(self, ranks: Sequence[int], rank: int, timeout: timedelta, leave: Callable[[], None]) -> None:
        self.ranks, self.rank, self.timeout, self._leave = list(ranks), rank, timeout, leave
        key = tuple(ranks)
        name = f"flex_model/{crc32(repr(key).encode()):08x}/{_count[key]}"
        _count[key] += 1
        default: Any = dist.distributed_c10d._get_default_store()
        self.store = PrefixStore(name, default)
        self._own = PrefixStore(name, default.clone())  # of the thread: the other's may be waiting
        self.epoch, self.entered, self.call, self.place = 0, 0, -1, ""
        self.passed: Any = ""  # a site, or what has one as ``where``
        self._told: tuple[Any, ...] = ()
        self._warned = -1
        pulse.add(self)

    # -- this rank ---------------------------------------------------------------------------------------------
    def at(self, place: Any) -> _At:
        return _At(self, place)

    def fail(self, error: BaseException) -> None:
        """This rank ends with an exception of its own: it says so, and enters no collective of this epoch any more."""
        if _shared(error):
            return
        mark_shared(error)
        lines = "".join(traceback.format_exception(error))
        place = _name(self.place or self.passed)
        text = summary(error)
        self._post(Failure("error", self.rank, place, self.call, text, lines))
        self.leave()

    @contextmanager
    def telling(self) -> Iterator[None]:
        """What is raised in here ends this rank alone: the others are told."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    def leaves(self, leave: Callable[[], None]) -> None:
        """The groups are others now: an engine was applied."""
        self._leave = leave

    def leave(self) -> None:
        """Forget the groups of this epoch."""
        self.epoch += 1
        self._leave()

    def waiting(self, seconds: float) -> None:
        """Called now and then while this rank waits: has another one failed? Raises what there is to raise."""
        place = _name(self.place)
        failure = self.posted()
        if failure is not None:
            raise self.end(failure, place)
        if seconds > _LONG and self._warned != self.entered:
            self._warned = self.entered
            told = self._where_others_are(place, self.ask())[0] or "all ranks are here by now"
            logger.warning("rank %d has waited %.0f s at %s: %s", self.rank, seconds, place, told)

    # -- the others --------------------------------------------------------------------------------------------
    def explain(self, error: BaseException, place: str) -> BaseException:
        """What is behind an exception that a collective raised at ``place``; itself, if it has to do with no rank."""
        if not isinstance(error, RuntimeError) or not (
            isinstance(error, dist.DistError) or _OF_RANKS.search(str(error))
        ):
            return error
        traceback.clear_frames(error.__traceback__)  # what they hold of a group would keep its connections open
        return self.end(self.posted() or self._post(self._investigate(place, error)), place)

    def end(self, failure: Failure, place: str) -> FlexModelError:
        """This rank learns of a failure: the error to raise."""
        self.leave()
        out = failure.on(self.rank, place)
        mark_shared(out)
        return out

    def posted(self) -> Failure | None:
        """What another rank has said of this epoch."""
        key = f"failed/{self.epoch}"
        try:
            return Failure(**json.loads(self.store.get(key))) if self.store.check([key]) else None
        except RuntimeError:  # the store is gone; what found that will be told
            return None

    def _post(self, failure: Failure) -> Failure:
        """Say it, unless somebody has said something already, which then stands."""
        try:
            said = self.store.compare_set(f"failed/{self.epoch}", "", json.dumps(asdict(failure)))
            return Failure(**json.loads(said))
        except RuntimeError:
            return failure

    def _investigate(self, place: str, error: BaseException) -> Failure:
        """Ask all ranks where they are."""
        try:
            beats = self.ask()
        except RuntimeError:
            text = f"{place}: the exchange with other ranks failed, and their store is gone: {error}"
            return Failure("absent", self.rank, place, self.call, text)
        posted = self.posted()
        if posted is not None:
            return posted
        told, all_wait = self._where_others_are(place, beats)
        told = told or f"all ranks answer, but the exchange failed: {str(error)[:300]}"
        found = f"rank {self.rank} cannot go on from {place} in call {self.call}: {told}."
        return Failure("mismatch" if all_wait else "absent", self.rank, place, self.call, found)

    def _where_others_are(self, place: str, beats: dict[int, tuple[_Beat | None, bool]]) -> tuple[str, bool]:
        """In words, of ranks that are not at ``place``; and whether all of them wait at others."""
        away, elsewhere = [], []
        for rank, (beat, alive) in sorted(beats.items()):
            when = "" if beat is None or beat.call < 0 else f" in call {beat.call}"
            last = (
                "it has told of no site" if beat is None or not beat.passed else f"it last told of {beat.passed}{when}"
            )
            if not alive:
                away.append(f"rank {rank} does not answer (its process is gone); {last}")
            elif beat is not None and (not beat.place or beat.epoch != self.epoch):
                away.append(f"rank {rank} is alive but has not come; {last}")
            elif beat is not None and beat.place != place:
                elsewhere.append(f"rank {rank} is at {beat.place}{when}")
        told = [*away, *elsewhere]
        more = f"; and {len(told) - 8} more" if len(told) > 8 else ""
        return "; ".join(told[:8]) + more, bool(elsewhere) and not away

    def ask(self) -> dict[int, tuple[_Beat | None, bool]]:
        """{rank: (where it is, or was when it last said so; whether it has answered)} of the other ranks."""
        number = int(self.store.add("asked", 1))
        others = [r for r in self.ranks if r != self.rank]
        out: dict[int, tuple[_Beat | None, bool]] = {}
        deadline = time.monotonic() + _ANSWER
        while True:
            for rank in [r for r in others if not out.get(r, (None, False))[1]]:
                beat = self.beat_of(rank)
                out[rank] = (beat, beat is not None and beat.asked >= number)
            if all(alive for _, alive in out.values()) or time.monotonic() > deadline or self.posted() is not None:
                return out
            time.sleep(PERIOD / 5)

    def beat_of(self, rank: int) -> _Beat | None:
        key = f"beat/{rank}"
        return _Beat(**json.loads(self.store.get(key))) if self.store.check([key]) else None

    def beat(self) -> None:
        """Say where this rank is, if that changed or somebody asked. Called by the thread."""
        asked = int(self._own.add("asked", 0))
        state = (asked, self.epoch, self.entered, _name(self.place), _name(self.passed), self.call)
        if state != self._told:
            self._own.set(f"beat/{self.rank}", json.dumps(asdict(_Beat(*state))))
            self._told = state


class NoWatch:
    """Of a model on one process, which nobody waits for."""

    call, passed = -1, ""

    def at(self, place: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def telling(self) -> AbstractContextManager[None]:
        return nullcontext()

    def fail(self, error: BaseException) -> None: ...


class _At:
    """Around a collective: where this rank is; what goes wrong in it is explained."""

    __slots__ = ("before", "place", "watch")

    def __init__(self, watch: Watch, place: Any) -> None:
        self.watch, self.place, self.before = watch, place, ""

    def __enter__(self) -> None:
        global _current
        watch = _current = self.watch
        self.before, watch.place = watch.place, self.place
        watch.entered += 1

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        global _current
        watch, _current = self.watch, None
        if error is not None and not _shared(error):
            told = watch.explain(error, _name(self.place))
            watch.place = self.before
            if told is not error:
                raise told from error
            return
        watch.place, watch.passed = self.before, self.place


def wait(work: Any) -> None:
    """Wait, in host memory, for ranks that may be long in coming. In between Ctrl-C is heard, and who has failed."""
    if not hasattr(work, "is_completed"):
        work.wait()
        return
    start = time.monotonic()
    while True:
        try:
            work.wait(_PATIENCE)
            return
        except RuntimeError:
            if work.is_completed():  # it has failed, or has come to its end just after this wait did
                work.wait()
                return
        if _current is not None:
            _current.waiting(time.monotonic() - start)


def mark_shared(error: BaseException) -> None:
    """All ranks know of this error: those that do not raise it have been told."""
    error._flex_model_shared = True  # type: ignore[attr-defined]


def _shared(error: BaseException) -> bool:
    return getattr(error, "_flex_model_shared", False)


def _name(place: Any) -> str:
    return place if isinstance(place, str) else str(place.where)


_current: Watch | None = None  # whose collective runs
