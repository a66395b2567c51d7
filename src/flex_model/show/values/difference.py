"""``Difference``: how far two tensors of one shape are apart, a piece at a time."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan, sqrt

from torch import Tensor

from flex_model.show.values.summary import pieces

__all__ = ["Difference", "difference"]


@dataclass(frozen=True, slots=True)
class Difference:
    """``largest`` and ``mean`` of the absolute difference; ``relative``: its norm, relative to the larger norm of the
    two, as in ``flex_model.check.diff``; ``cosine`` of the angle between them, NaN where one is zero. All this is of
    elements that are finite in both; ``unlike`` counts those that are not, and are not the same."""

    largest: float
    mean: float
    relative: float
    cosine: float
    unlike: int


def difference(a: Tensor, b: Tensor) -> Difference:
    """
    >>> import torch
    >>> found = difference(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0]))
    >>> found.largest, found.mean, found.relative, found.cosine
    (4.0, 2.0, 0.8, 0.6)
    """
    count, unlike, largest, total = 0, 0, 0.0, 0.0
    squares, of_a, of_b, dot = 0.0, 0.0, 0.0, 0.0
    for (x, y), _ in pieces(a, b.to(a.device)):
        both = x.isfinite() & y.isfinite()
        if not bool(both.all()):
            unlike += int((~both & (x != y) & ~(x.isnan() & y.isnan())).sum())
            x, y = x[both], y[both]
        if not x.numel():
            continue
        apart = (x - y).abs()
        count += x.numel()
        largest, total = max(largest, float(apart.max())), total + float(apart.sum())
        squares += float(apart.square_().sum())
        of_a, of_b, dot = of_a + float((x * x).sum()), of_b + float((y * y).sum()), dot + float((x * y).sum())
    scale = sqrt(max(of_a, of_b))
    return Difference(
        largest=largest if count else nan,
        mean=total / count if count else nan,
        relative=(sqrt(squares) / scale if scale else 0.0) if count else nan,
        cosine=dot / sqrt(of_a) / sqrt(of_b) if of_a and of_b else nan,
        unlike=unlike,
    )
