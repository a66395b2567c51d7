"""``Memory``: large host memory that is used again once whoever had it has let it go.

The system hands out large memory page by page as it is first written, which takes longer than the writing. Captures
of one step have the sizes of those before, so that their memory does for these.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

__all__ = ["LARGE", "Memory"]

LARGE = 2**20  # bytes; below, the allocator does this by itself
_ROOM = 2**29  # bytes kept while nobody has them


class Memory:
    """Where one model's captures and messages lie.

    >>> memory = Memory()
    >>> first = memory.empty((1024, 1024), torch.float32).fill_(1.0)
    >>> where = first.data_ptr()
    >>> del first
    >>> memory.empty((1024, 1024), torch.int32).data_ptr() == where
    True
    """

    def __init__(self, room: int = _ROOM) -> None:
        self._room = room
        self._free: list[Tensor] = []  # the oldest first

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """A tensor that holds anything. Its memory comes back by itself, when the last view of it is gone."""
        size = prod(shape) * dtype.itemsize
        with torch.inference_mode(False):  # what is captured there is an ordinary tensor too
            if size < LARGE or torch.device(device).type != "cpu":
                return torch.empty(tuple(shape), dtype=dtype, device=device)
            block = self._take(size)
            lent = (ctypes.c_ubyte * size).from_address(block.data_ptr())  # lives as long as a tensor is in it
            weakref.finalize(lent, self._take_back, block).atexit = False
            return torch.frombuffer(lent, dtype=dtype).view(tuple(shape))

    def _take(self, size: int) -> Tensor:
        for i in reversed(range(len(self._free))):  # the last to come back may still be in the cache
            if self._free[i].numel() == size:
                return self._free.pop(i)
        return torch.empty(size, dtype=torch.uint8)

    def _take_back(self, block: Tensor) -> None:
        self._free.append(block)
        while sum(b.numel() for b in self._free) > self._room:
            self._free.pop(0)
