"""``Moments``: count, mean and variance of every column, merged exactly over ranks, parts and commits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Moments"]

_BLOCK = 1 << 18  # numbers at a time, so that they stay in the cache


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

    @classmethod
    def of(cls, rows: Tensor) -> Moments:
        """Of ``(rows, width)``."""
        whole = cls.zeros(rows.shape[1])
        for block in rows.split(max(1, _BLOCK // rows.shape[1])):
            whole.merge(cls._of_block(block))
        return whole

    @classmethod
    def _of_block(cls, rows: Tensor) -> Moments:
        import numpy as np

        wide = rows.to(torch.float64, copy=True)
        mean = wide.mean(0)
        m2 = wide.sub_(mean).square_().sum(0)
        return cls(np.full(rows.shape[1], float(len(rows))), mean.numpy(), m2.numpy())

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
