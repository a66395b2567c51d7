"""``DifferencePicture``: what ``acts.show(against=other)`` gives: how far two captures are apart."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from flex_model.check.diff import tolerance_of
from flex_model.components.place import Place
from flex_model.core.captured import Captured
from flex_model.core.naming.globs import Pattern
from flex_model.errors import DeliveryError
from flex_model.show.values.difference import Difference, difference
from flex_model.show.values.entry import Entry, chosen, of_call
from flex_model.show.values.heat import MEASURES, Measure, heat, measured, one_row, title_of
from flex_model.show.values.labels import Tokens
from flex_model.show.values.picture import ValuesPicture, number
from flex_model.show.values.sheet import Row, Sheet, SheetPicture

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["DifferencePicture"]

_COLUMNS = ("name", "", "shape", "max |a-b|", "mean |a-b|", "relative", "cosine", "unlike")


class DifferencePicture(SheetPicture):
    """Printed it is a table with a row a value that both captures have. ``relative``: the norm of the difference,
    relative to the larger norm; ``cosine`` of the angle between the two; ``unlike``: how many elements are infinite or
    NaN in one and not the same in the other. A star is on those that differ by more than the dtype's tolerance.

    >>> print(acts.show(against=other))                                                  # doctest: +SKIP
    >>> acts.show(against=other).heatmap("relative", tokens=ids).show()                  # doctest: +SKIP

    Captures whose values stay in shards are compared by ``flex_model.check.diff``.
    """

    def __init__(self, a: Captured, b: Captured, pattern: Pattern | Place = "**", *, grad: bool = False) -> None:
        self._a, self._b = (ValuesPicture(acts, pattern, grad=grad) for acts in (a, b))

    @property
    def away(self) -> str:
        return self._a.away or self._b.away

    @cached_property
    def _pairs(self) -> dict[str, tuple[Entry, Entry] | str]:
        """What both have, and why others cannot be compared."""
        first, second = ({str(e): e for e in side.entries} for side in (self._a, self._b))
        return {name: _pair(first.get(name), second.get(name)) for name in dict.fromkeys([*first, *second])}

    @cached_property
    def differences(self) -> dict[str, Difference]:
        """The table's numbers by name."""
        return {n: difference(*_values(pair)) for n, pair in self._pairs.items() if not isinstance(pair, str)}

    @property
    def sheet(self) -> Sheet:
        if self.away:
            return Sheet(f"nothing is here to compare: {self.away}", _COLUMNS, [])
        rows = [self._row(name, pair) for name, pair in self._pairs.items()]
        apart = sum(row.alert for row in rows)
        return Sheet(f"{apart} of {len(self.differences)} values differ", _COLUMNS, rows)

    def _row(self, name: str, pair: tuple[Entry, Entry] | str) -> Row:
        if isinstance(pair, str):
            return Row((name,), why=pair)
        a, b = _values(pair)
        found = self.differences[name]
        tolerance = tolerance_of(*(str(t.dtype).removeprefix("torch.") for t in (a, b)))
        differs = found.unlike > 0 or found.relative > tolerance
        numbers = (*map(number, (found.largest, found.mean, found.relative)), f"{found.cosine:.6g}")
        return Row((name, "*" if differs else "", str(list(a.shape)), *numbers, str(found.unlike)), alert=differs)

    def heatmap(
        self,
        what: Measure = "norm",
        *,
        names: Pattern | Place = "**",
        row: int = 0,
        call: int | None = None,
        tokens: Tokens | None = None,
        decode: Callable[[int], str] = str,
    ) -> Figure:
        """As ``ValuesPicture.heatmap``, of the differences of sites that both have; "relative" is the norm of the
        difference, relative to the larger norm at this position."""
        if self.away:
            raise DeliveryError(f"nothing is here to compare: {self.away}")
        shared = {n for n, pair in self._pairs.items() if not isinstance(pair, str)}
        sides = [[e for e in side.entries if str(e) in shared] for side in (self._a, self._b)]
        if not shared:
            raise DeliveryError("the captures have no value in common; print the picture to see why.")
        (first, rows), (second, _) = (one_row(of_call(chosen(side, names), call), row) for side in sides)
        numbers = {n: _apart(what, x, second[n], n) for n, x in first.items() if x is not None}
        title = "Relative difference" if what == "relative" else f"{title_of(what)} of the difference"
        return heat(numbers, title, row=row, rows=rows, tokens=tokens, decode=decode)


def _pair(a: Entry | None, b: Entry | None) -> tuple[Entry, Entry] | str:
    if a is None or b is None:
        return f"it is only in the {'second' if a is None else 'first'} capture"
    if a.value is None or b.value is None:
        return a.why or b.why
    if a.value.shape != b.value.shape:
        return f"the shapes are {list(a.value.shape)} and {list(b.value.shape)}"
    return a, b


def _values(pair: tuple[Entry, Entry]) -> tuple[Tensor, Tensor]:
    a, b = pair
    assert a.value is not None and b.value is not None
    return a.value, b.value


def _apart(what: Measure, a: Tensor, b: Tensor | None, name: str) -> Tensor:
    assert b is not None
    if what == "relative":
        larger = MEASURES["norm"](a).maximum(MEASURES["norm"](b))
        return MEASURES["norm"](a - b) / larger.clamp_min(1e-300)
    return measured(what, a - b, name)
