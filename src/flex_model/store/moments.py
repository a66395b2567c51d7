"""``Moments``: count, mean and variance of every column, merged exactly over ranks, parts and commits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Moments", "Sums"]

_BLOCK = 1 << 18  # numbers at a time: as many stay in the cache, and a call costs little beside them
_ADDED = 64  # lines that are added in float32
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
    """The moments of rows that come by and by, in one pass and with no more memory than a block.

    Squares are summed as they are where numbers have 16 bits or fewer: with so few digits a column's spread is no
    smaller than its mean's last digit. Some of these at a time are added in float32, and all else in float64. Others
    are summed as distances from a mean.
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
        narrow = rows.element_size() <= 2
        line = self._width * self._fold
        size = max(1, min(_BLOCK // line, _ADDED) if narrow else _BLOCK // (2 * line)) * self._fold
        block = torch.empty(size, self._width, dtype=torch.float32 if narrow else torch.float64)
        for part in rows.split(size):
            self._rows += len(part)
            if not (narrow and self._add(part, block)):
                self._add(part, block.double())

    def _add(self, part: Tensor, block: Tensor) -> bool:
        """Nothing is added where squares are beyond float32, or numbers not finite."""
        import numpy as np

        numbers: NDArray[Any] = block[: len(part)].copy_(part).numpy()
        with np.errstate(invalid="ignore", over="ignore"):
            if part.element_size() > 2:
                if self._shift is None:
                    self._shift = numbers.mean(0)
                np.subtract(numbers, self._shift, out=numbers)
            flat = numbers.reshape(-1)
            line = self._width * self._fold
            whole = flat[: len(flat) // line * line].reshape(-1, line)
            pieces = [whole, flat[whole.size :].reshape(1, -1)]  # the last line may be shorter
            sums = [np.add.reduce(piece, 0) for piece in pieces]
            np.multiply(flat, flat, out=flat)
            squares = [np.add.reduce(piece, 0) for piece in pieces]
            if numbers.dtype == np.float32 and not all(np.isfinite(found).all() for found in squares):
                return False
            for found, total in ((sums, self._sum), (squares, self._squares)):
                for piece in found:
                    total[: len(piece)] += piece
        return True

    def moments(self) -> Moments:
        import numpy as np

        count = max(self._rows, 1)
        with np.errstate(invalid="ignore", over="ignore"):
            away = self._sum.reshape(self._fold, -1).sum(0) / count
            m2 = np.maximum(self._squares.reshape(self._fold, -1).sum(0) - count * away**2, 0)
        mean = away if self._shift is None else away + self._shift
        return Moments(np.full(self._width, float(self._rows)), mean, m2)
