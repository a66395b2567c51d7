"""``Moments``: count, mean and variance of every column, merged exactly over ranks, parts and commits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Moments", "Sums"]

_BLOCK = 1 << 17  # numbers at a time: in float64 they stay in the cache, and a call costs little beside them
_LINE = 1 << 11  # numbers that are added at once, or a call of numpy costs more than its work


@dataclass(slots=True)
class Moments:
    """Of a site's columns, in float64: ``count``, ``mean`` and ``m2`` (squared distances from the mean, summed), each
    ``(width,)``. Merged as in Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances" (1979).
    """

    count: NDArray[np.float64]
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]

    @classmethod
    def zeros(cls, width: int) -> Moments:
        import numpy as np

        return cls(np.zeros(width), np.zeros(width), np.zeros(width))

    def merge(self, other: Moments, columns: tuple[int, int] | None = None) -> None:
        """Take in what another saw of ``columns``."""
        import numpy as np

        at = slice(*columns) if columns is not None else slice(None)
        n, m = self.count[at], other.count
        total = np.maximum(n + m, 1)
        gap = other.mean - self.mean[at]
        self.m2[at] += other.m2 + gap**2 * n * m / total
        self.mean[at] += gap * m / total
        self.count[at] = n + m

    @property
    def std(self) -> NDArray[np.float64]:
        """Of the population, as ``numpy.std``."""
        import numpy as np

        deviation: NDArray[np.float64] = np.sqrt(self.m2 / np.maximum(self.count, 1))
        return deviation

    @property
    def norm(self) -> float:
        """The root of the rows' mean squared norm, which is exact however the columns were split."""
        import numpy as np

        return float(np.sqrt((self.m2 / np.maximum(self.count, 1) + self.mean**2).sum()))


class Sums:
    """The moments of rows that come by and by, in one pass in float64 and with no more memory than a block.

    Squares are summed as they are where numbers have 16 bits or fewer: with so few digits a column's spread is no
    smaller than its mean's last digit, and float64 has room for both. Others are summed as distances from a mean.
    """

    def __init__(self, width: int) -> None:
        import numpy as np

        self._width, self._fold = width, max(1, _LINE // width)  # rows that are added as one line
        self._rows = 0
        self._shift: NDArray[np.float64] | None = None
        self._sum, self._squares = np.zeros(width * self._fold), np.zeros(width * self._fold)

    def take(self, rows: int, sums: Tensor) -> None:
        """As ``add`` of so many rows; ``sums``: of each column the numbers and their squares, (2, width) in float64."""
        import numpy as np

        total, squares = sums.numpy()
        with np.errstate(invalid="ignore", over="ignore"):
            if self._shift is not None:
                squares = squares - 2 * self._shift * total + rows * self._shift**2
                total = total - rows * self._shift
            self._sum[: self._width] += total
            self._squares[: self._width] += squares
        self._rows += rows

    def add(self, rows: Tensor) -> None:
        """``(rows, width)``, of a dtype of the store."""
        import numpy as np

        line = self._width * self._fold
        block = torch.empty(max(1, _BLOCK // line) * self._fold, self._width, dtype=torch.float64)
        for part in rows.split(len(block)):
            known = part.float() if part.dtype == torch.float16 else part  # torch is slow to make float64 of it
            numbers = block[: len(part)].copy_(known).numpy()
            self._rows += len(part)
            with np.errstate(invalid="ignore", over="ignore"):  # rows may hold infinities
                if rows.element_size() > 2:
                    if self._shift is None:
                        self._shift = numbers.mean(0)
                    np.subtract(numbers, self._shift, out=numbers)
                flat = numbers.reshape(-1)
                whole = flat[: len(flat) // line * line].reshape(-1, line)
                for piece in (whole, flat[whole.size :].reshape(1, -1)):  # the last line may be shorter
                    self._take(piece)

    def _take(self, lines: NDArray[np.float64]) -> None:
        """And square them in place."""
        import numpy as np

        at = slice(lines.shape[1])
        self._sum[at] += np.add.reduce(lines, 0)
        np.multiply(lines, lines, out=lines)
        self._squares[at] += np.add.reduce(lines, 0)

    def moments(self) -> Moments:
        import numpy as np

        count = max(self._rows, 1)
        with np.errstate(invalid="ignore", over="ignore"):
            away = self._sum.reshape(self._fold, -1).sum(0) / count
            m2 = np.maximum(self._squares.reshape(self._fold, -1).sum(0) - count * away**2, 0)
        mean = away if self._shift is None else away + self._shift
        return Moments(np.full(self._width, float(self._rows)), mean, m2)
