"""``WriteQueue``: work for a few threads, with at most so many bytes waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from queue import SimpleQueue

from flex_model.errors import FlexModelError, StoreError

__all__ = ["WriteQueue"]


class WriteQueue:
    """Work of one key is done in order, by one thread. ``put`` waits while the queue is full; nothing is dropped.

    The first error ends all work, and is raised by every later ``put`` and ``wait``.
    """

    def __init__(self, limit: int, *, threads: int = 2) -> None:
        self._limit = limit
        self._bytes = 0  # given and not done
        self._tasks = 0
        self._changed = threading.Condition()
        self._error: FlexModelError | None = None
        self._work: list[SimpleQueue[tuple[Callable[[], object], int] | None]] = [SimpleQueue() for _ in range(threads)]
        self._of: dict[Hashable, int] = {}
        self._threads = [threading.Thread(target=self._run, args=(work,), daemon=True) for work in self._work]
        for thread in self._threads:
            thread.start()

    def reserve(self, size: int) -> None:
        """Wait for room; more than fits goes alone."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or not self._bytes or self._bytes + size <= self._limit)
            self._check()
            self._bytes += size

    def put(self, key: Hashable, work: Callable[[], object], *, reserved: int = 0) -> None:
        """Do ``work`` after what was put before under this key, then give back what was reserved for it."""
        number = self._of.setdefault(key, len(self._of) % len(self._work))
        with self._changed:
            self._tasks += 1
        self._work[number].put((work, reserved))

    def wait(self, until: Callable[[], object] | None = None) -> None:
        """Until something that the work brings about is so; or until all is done."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or (until() if until is not None else not self._tasks))
            self._check()

    @property
    def bytes(self) -> int:
        """Waiting, or being written."""
        return self._bytes

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End the threads; what still waits is done first, unless there was an error."""
        for work in self._work:
            work.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self, work: SimpleQueue[tuple[Callable[[], object], int] | None]) -> None:
        while (task := work.get()) is not None:
            error = None if self._error else _try(task[0])
            with self._changed:
                self._error = self._error or error
                self._bytes -= task[1]
                self._tasks -= 1
                self._changed.notify_all()
            del task  # and the rows that it holds


def _try(work: Callable[[], object]) -> FlexModelError | None:
    try:
        work()
    except FlexModelError as error:
        return error
    except Exception as error:  # a thread must not end without a word
        failed = StoreError(f"rows could not be written: {type(error).__name__}: {error}.")
        failed.__cause__ = error
        return failed
    return None
