"""``WriteQueue``: work for a few threads, with at most so many bytes waiting."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable
from typing import TypeAlias

from flex_model.errors import FlexModelError, StoreError

__all__ = ["Work", "WriteQueue"]

Work: TypeAlias = Callable[[], "tuple[Hashable, Work] | None"]
"""What it returns is done next, under that key; what was reserved passes to it."""


class WriteQueue:
    """Work of one key is done in order, never two at a time; any thread takes what is next. ``reserve`` waits while
    the queue is full; nothing is dropped.

    The first error ends all work, and is raised by every later ``reserve`` and ``wait``.
    """

    def __init__(self, limit: int, *, threads: int = 2) -> None:
        self._limit = limit
        self._bytes = 0  # given and not done
        self._tasks = 0
        self._changed = threading.Condition()
        self._error: FlexModelError | None = None
        self._ended = self._dropped = False
        self._of: dict[Hashable, deque[tuple[Work, int]]] = {}  # keys with work that waits or is being done
        self._ready: deque[Hashable] = deque()  # of these, those that no thread is at
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def reserve(self, size: int) -> None:
        """Wait for room; more than fits goes alone."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or not self._bytes or self._bytes + size <= self._limit)
            self._check()
            self._bytes += size

    def put(self, key: Hashable, work: Work, *, reserved: int = 0) -> None:
        """Do ``work`` after what was put before under this key, then give back what was reserved for it."""
        with self._changed:
            self._add(key, work, reserved)
            self._changed.notify_all()

    def _add(self, key: Hashable, work: Work, reserved: int) -> None:
        self._tasks += 1
        if key not in self._of:
            self._ready.append(key)
        self._of.setdefault(key, deque()).append((work, reserved))

    def wait(self, until: Callable[[], object] | None = None) -> None:
        """Until something that the work brings about is so; or until all is done."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or (until() if until is not None else not self._tasks))
            if until is None or not until():
                self._check()

    @property
    def bytes(self) -> int:
        """Waiting, or being written."""
        return self._bytes

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def stop(self, *, drop: bool = False) -> None:
        """End the threads; what still waits is done first, unless there was an error or it is to be dropped."""
        with self._changed:
            self._ended, self._dropped = True, drop
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (key := self._next()) is not None:
            work, reserved = self._of[key].popleft()
            more = None if self._error or self._dropped else self._do(work)
            del work  # and the rows that it holds
            with self._changed:
                self._tasks -= 1
                if more is None:
                    self._bytes -= reserved
                else:
                    self._add(*more, reserved)
                del more
                if self._of[key]:
                    self._ready.append(key)
                else:
                    del self._of[key]
                self._changed.notify_all()

    def _next(self) -> Hashable | None:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or (self._ended and not self._tasks))
            return self._ready.popleft() if self._ready else None

    def _do(self, work: Work) -> tuple[Hashable, Work] | None:
        try:
            return work()
        except FlexModelError as error:
            failed = error
        except Exception as error:  # a thread must not end without a word
            failed = StoreError(f"rows could not be written: {type(error).__name__}: {error}.")
            failed.__cause__ = error
        with self._changed:
            self._error = self._error or failed
        return None
