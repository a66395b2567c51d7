"""``Histogram``: how values are spread, in one pass over pieces whose range nobody knows beforehand.

Bins are as wide as a power of two and begin at multiples of it. Where a value lies outside, bins are joined by twos and
fours, so that the counts are exact and the same in whatever pieces the values came.
"""

from __future__ import annotations

from math import frexp

import torch
from torch import Tensor

__all__ = ["Histogram"]

_MOST = 1 << 14  # bins: the bulk keeps some where a few values are a thousand times larger
_FINEST = 40  # powers of two below the largest value: a bin's number stays an exact integer
_BLOCKS = " ▁▂▃▄▅▆▇█"


class Histogram:
    """Counts of finite values: ``counts[i]`` are in ``edges[i] <= x < edges[i + 1]``.

    >>> found = Histogram()
    >>> found.add(torch.tensor([0.0, 1.0, 1.5, 7.0]))
    >>> found.coarse(4).counts.tolist(), found.coarse(4).edges.tolist()
    ([3, 0, 0, 1], [0.0, 2.0, 4.0, 6.0, 8.0])
    """

    def __init__(self) -> None:
        self._exponent, self._first = -1074, 0
        self.counts = torch.zeros(0, dtype=torch.long)

    def add(self, values: Tensor) -> None:
        """Take in finite values, in float64 and flattened."""
        if not values.numel():
            return
        low, high = (float(x) for x in values.aminmax())
        exponent = self._fitting(low, high)
        self._join(exponent - self._exponent)
        self._exponent = exponent
        places = (values * 2.0**-exponent).floor_().long()
        first = int(places.min())
        found = torch.bincount(places - first).cpu()
        self._put(found, first)

    def _fitting(self, low: float, high: float) -> int:
        """The least exponent at which these and all before fit in."""
        largest = max(abs(low), abs(high))
        exponent = max(self._exponent, -1000, frexp(largest)[1] - _FINEST if largest else -1000)
        if len(self.counts):
            low = min(low, self._first * 2.0**self._exponent)
            high = max(high, (self._first + len(self.counts) - 1) * 2.0**self._exponent)
        while high * 2.0**-exponent // 1 - low * 2.0**-exponent // 1 >= _MOST:
            exponent += 1
        return exponent

    def _join(self, powers: int) -> None:
        if powers <= 0 or not len(self.counts):
            return
        powers = min(powers, 62)
        places = (torch.arange(len(self.counts)) + self._first) >> powers
        self._first = int(places[0])
        joined = torch.zeros(int(places[-1]) - self._first + 1, dtype=torch.long)
        self.counts = joined.index_add_(0, places - self._first, self.counts)

    def _put(self, counts: Tensor, first: int) -> None:
        if not len(self.counts):
            self.counts, self._first = counts, first
            return
        start, mine = min(first, self._first), slice(self._first, self._first + len(self.counts))
        total = torch.zeros(max(mine.stop, first + len(counts)) - start, dtype=torch.long)
        total[mine.start - start : mine.stop - start] += self.counts
        total[first - start : first - start + len(counts)] += counts
        self.counts, self._first = total, start

    @property
    def width(self) -> float:
        return 2.0**self._exponent

    @property
    def edges(self) -> Tensor:
        """One more than there are counts; in float64."""
        return (torch.arange(len(self.counts) + 1, dtype=torch.double) + self._first) * self.width

    def coarse(self, most: int) -> Histogram:
        """The same in no more than ``most`` bins, two or more."""
        out = Histogram()
        out._exponent, out._first, out.counts = self._exponent, self._first, self.counts
        while len(out.counts) > most:
            out._join(1)
            out._exponent += 1
        return out

    def within(self, share: float) -> Histogram:
        """Without the outermost bins that hold no more than half of what is beyond this share, on each side."""
        if not len(self.counts):
            return self
        spare = int((1 - share) / 2 * int(self.counts.sum()))
        before = int((self.counts.cumsum(0) <= spare).sum())
        after = int((self.counts.flip(0).cumsum(0) <= spare).sum())
        out = Histogram()
        out._exponent, out._first = self._exponent, self._first + before
        out.counts = self.counts[before : len(self.counts) - after]
        return out

    def spark(self, most: int = 16) -> str:
        """A line of blocks, one a bin; any count is at least the lowest block."""
        counts = self.coarse(most).counts
        top = int(counts.max()) if len(counts) else 1
        return "".join(_BLOCKS[-(-8 * c // top)] for c in counts.tolist())
