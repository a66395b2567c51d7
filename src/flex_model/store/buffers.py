"""``Buffers``: memory for copies of rows, used again: new memory costs the machine more than the copying."""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Buffers"]

_SMALL = 1 << 18  # below this malloc has it at hand


class Buffers:
    """At most ``limit`` bytes are kept that nobody uses."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._free: list[tuple[int, int, NDArray[np.uint8]]] = []  # by size; the address decides between equals
        self._kept = 0
        self._lent: dict[int, NDArray[np.uint8]] = {}  # by address
        self._lock = threading.Lock()

    def take(self, size: int) -> NDArray[np.uint8]:
        """One of ``size`` bytes or up to twice as many."""
        import numpy as np

        with self._lock:
            at = bisect_left(self._free, size, key=lambda free: free[0])
            if size >= _SMALL and at < len(self._free) and self._free[at][0] <= 2 * size:
                self._kept -= self._free[at][0]
                return self._free.pop(at)[2]
        return np.empty(size, np.uint8)

    def give(self, buffer: NDArray[np.uint8]) -> None:
        """One that was taken and is not needed any more."""
        with self._lock:
            if buffer.size >= _SMALL and self._kept + buffer.size <= self._limit:
                insort(self._free, (buffer.size, buffer.ctypes.data, buffer))
                self._kept += buffer.size

    def lend(self, size: int) -> NDArray[np.uint8]:
        """``size`` bytes of one, for somebody who gives them back without knowing of which."""
        buffer = self.take(size)
        with self._lock:
            self._lent[buffer.ctypes.data] = buffer
        return buffer[:size]

    def returned(self, data: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
        """The one that was lent as ``data``, to be given once it is not needed any more; None of other memory."""
        with self._lock:
            return self._lent.pop(data.ctypes.data, None)
