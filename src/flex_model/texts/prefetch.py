"""``prefetched``: items that a thread makes ahead of their use."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from queue import SimpleQueue
from typing import TypeVar

__all__ = ["prefetched"]

T = TypeVar("T")


def prefetched(items: Generator[T, None, None], ahead: int) -> Iterator[T]:
    """The same items in the same order, at most ``ahead`` of them waiting; an error comes where it would have."""
    if not ahead:
        yield from items
        return
    room = threading.Semaphore(ahead)
    stopped = threading.Event()
    made: SimpleQueue[T | _End] = SimpleQueue()

    def work() -> None:
        end = _End(None)
        try:
            while room.acquire() and not stopped.is_set() and (item := next(items, end)) is not end:
                made.put(item)
        except BaseException as error:  # told where the items are used
            end = _End(error)
        items.close()
        made.put(end)

    thread = threading.Thread(target=work, daemon=True, name="flex_model.texts")
    thread.start()
    try:
        while not isinstance(item := made.get(), _End):
            room.release()
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stopped.set()
        room.release()
        if thread is not threading.current_thread():  # which may collect a loop that was left
            thread.join()


class _End:
    def __init__(self, error: BaseException | None) -> None:
        self.error = error
