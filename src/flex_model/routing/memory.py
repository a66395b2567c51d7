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
        self._free: dict[int, Tensor] = {}  # by address, the oldest first

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
        for where, block in reversed(list(self._free.items())):  # the last to come back may still be in the cache
            if block.numel() == size and self._free.pop(where, None) is not None:
                return block
        return torch.empty(size, dtype=torch.uint8)

    def _take_back(self, block: Tensor) -> None:
        """May be called from anywhere, also from within ``_take``: by the garbage collector."""
        self._free[block.data_ptr()] = block
        while sum(b.numel() for b in list(self._free.values())) > self._room:
            self._free.pop(next(iter(self._free)), None)
