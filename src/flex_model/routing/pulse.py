"""The thread of this process that says how far it is, whatever its main thread does."""

from __future__ import annotations

import atexit
import threading
import weakref
from typing import Protocol

__all__ = ["PERIOD", "pulse"]

PERIOD = 0.5  # seconds


class Beating(Protocol):
    def beat(self) -> None: ...


class Pulse:
    """The thread of this process that answers for all its watches."""

    def __init__(self) -> None:
        self._watches: weakref.WeakSet[Beating] = weakref.WeakSet()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def add(self, watch: Beating) -> None:
        self._watches.add(watch)
        if self._thread is None or not self._thread.is_alive():  # not there, or left behind by a fork
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._run, args=(self._stop,), name="flex_model pulse", daemon=True)
            self._thread.start()
            atexit.register(self.stop)

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(1)

    def _run(self, stop: threading.Event) -> None:
        while not stop.wait(PERIOD):
            for watch in list(self._watches):
                try:
                    watch.beat()
                except RuntimeError:  # the store is gone: there is nobody to tell
                    self._watches.discard(watch)
            watch = None  # type: ignore[assignment]


pulse = Pulse()
