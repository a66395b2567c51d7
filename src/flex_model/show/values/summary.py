"""``Summary``: one tensor in a few numbers, in one pass and a piece at a time, so that no copy of it is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, nan, sqrt

import torch
from torch import Tensor

from flex_model.show.values.histogram import Histogram

__all__ = ["Summary", "pieces", "summarise"]

_CHUNK = 1 << 20  # elements that are float64 at a time


@dataclass(frozen=True, slots=True)
class Summary:
    """``norm``: the mean L2 norm of the rows, which are the last dim; ``zeros``: a share of all elements;
    ``nonfinite``: a count. All else is of the finite elements; of complex ones, of their real and imaginary parts."""

    shape: tuple[int, ...]
    dtype: str
    mean: float
    std: float
    norm: float
    low: float
    high: float
    zeros: float
    nonfinite: int
    histogram: Histogram


def pieces(*values: Tensor) -> Iterator[tuple[Sequence[Tensor], bool]]:
    """Tensors of one shape cut alike: (a piece of each, in float64; whether its rows are over with it).

    A piece holds whole rows, unless it is part of a single row.
    """
    values = tuple(_real(v) for v in values)
    for cut, last in _cuts(values):
        yield [v.double() for v in cut], last


def _real(value: Tensor) -> Tensor:
    value = value.detach()
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj()).flatten(-2)
    return value if value.dim() else value.unsqueeze(0)


def _cuts(values: tuple[Tensor, ...]) -> Iterator[tuple[tuple[Tensor, ...], bool]]:
    first = values[0]
    if first.numel() <= _CHUNK:
        yield values, True
    elif first.dim() == 1:
        parts = [v.split(_CHUNK) for v in values]
        for i, cut in enumerate(zip(*parts, strict=True)):
            yield cut, i == len(parts[0]) - 1
    else:
        rows = max(1, _CHUNK * len(first) // first.numel())
        for cut in zip(*(v.split(rows) for v in values), strict=True):
            if rows == 1:
                yield from _cuts(tuple(v[0] for v in cut))
            else:
                yield cut, True


class _Sums:
    """What is added up over the pieces. Means and squared distances are merged as in Chan, Golub and LeVeque (1979)."""

    def __init__(self) -> None:
        self.elements = self.count = self.zeros = self.rows = 0
        self.mean = self.m2 = self.norms = self.squares = 0.0
        self.low, self.high = inf, -inf
        self.histogram = Histogram()

    def add(self, x: Tensor, last: bool) -> None:
        finite = x.isfinite()
        self.elements += x.numel()
        self.zeros += int((x == 0).sum())
        known = x.flatten() if bool(finite.all()) else x[finite]
        self._moments(known)
        self.histogram.add(known)
        squares = torch.where(finite, x, 0.0).square_().sum(-1)
        if x.dim() > 1:
            self.norms += float(squares.sqrt_().sum())
            self.rows += squares.numel()
            return
        self.squares += float(squares)
        if last:
            self.norms += sqrt(self.squares)
            self.rows, self.squares = self.rows + 1, 0.0

    def _moments(self, known: Tensor) -> None:
        n = known.numel()
        if not n:
            return
        mean = float(known.mean())
        gap, total = mean - self.mean, self.count + n
        self.m2 += float((known - mean).square_().sum()) + gap * gap * self.count * n / total
        self.mean += gap * n / total
        self.count = total
        self.low, self.high = min(self.low, float(known.min())), max(self.high, float(known.max()))


def summarise(value: Tensor) -> Summary:
    """Statistics of a tensor of any dtype.

    >>> one = summarise(torch.tensor([[3.0, -4.0], [0.0, float("nan")]]))
    >>> one.norm, one.zeros, one.nonfinite, one.low
    (2.5, 0.25, 1, -4.0)
    """
    sums = _Sums()
    for (x,), last in pieces(value):
        sums.add(x, last)
    known, shape = sums.count > 0, tuple(value.shape)
    return Summary(
        shape=shape,
        dtype=str(value.dtype).removeprefix("torch."),
        mean=sums.mean if known else nan,
        std=sqrt(sums.m2 / sums.count) if known else nan,
        norm=sums.norms / sums.rows if sums.rows else nan,
        low=sums.low if known else nan,
        high=sums.high if known else nan,
        zeros=sums.zeros / sums.elements if sums.elements else nan,
        nonfinite=sums.elements - sums.count,
        histogram=sums.histogram,
    )
