"""``ValuesPicture``: what ``acts.show()`` gives: statistics of captured values as a table, and figures of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from math import isnan
from typing import TYPE_CHECKING

from flex_model.components.place import Place
from flex_model.core.captured import Captured
from flex_model.core.naming.globs import Pattern
from flex_model.errors import DeliveryError, FlexModelError
from flex_model.show.values.attention import Chosen, attention, heads_of
from flex_model.show.values.bars import multiples, overlaid
from flex_model.show.values.entry import Entry, chosen, entries, of_call
from flex_model.show.values.heat import Measure, heat, measured, one_row, title_of
from flex_model.show.values.labels import Tokens
from flex_model.show.values.sheet import Row, Sheet, SheetPicture
from flex_model.show.values.summary import Summary, summarise

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["ValuesPicture", "number"]

_COLUMNS = ("name", "shape", "dtype", "mean", "std", "norm", "min", "max", "zeros", "nonfinite", "histogram")


def number(value: float) -> str:
    """
    >>> number(1234.5678), number(12345.678), number(float("nan"))
    ('1235', '1.235e+04', '-')
    """
    return "-" if isnan(value) else f"{value:.4g}"


class ValuesPicture(SheetPicture):
    """Printed it is a table with a row a value: ``norm`` is the mean L2 norm of its rows (the last dim), ``zeros`` the
    share of elements that are 0, and all numbers are of the finite elements. What was refused is named below it.

    >>> picture = acts.show()                                                            # doctest: +SKIP
    >>> print(picture)                                                                   # doctest: +SKIP
    >>> picture.save("values.html")                                                      # doctest: +SKIP
    >>> save_figure(picture.heatmap("norm", tokens=ids, decode=tokenizer.decode), "norms.svg")  # doctest: +SKIP
    >>> picture.attention(layer=3).show()                                                # doctest: +SKIP

    Figures are plotly's; ``flex_model.lens.save_figure`` writes them as .html, .png, .svg or .pdf. They raise
    DeliveryError where nothing was delivered.
    """

    def __init__(self, acts: Captured, pattern: Pattern | Place = "**", *, grad: bool = False) -> None:
        self.entries: list[Entry] = entries(acts, pattern, grad)
        self._what, self._elsewhere = "gradients" if grad else "values", acts._elsewhere

    @property
    def away(self) -> str:
        here = any(entry.value is not None for entry in self.entries)
        return self._elsewhere if not here else ""

    @cached_property
    def summaries(self) -> dict[str, Summary]:
        """The table's numbers by name; ``name#1`` of a second call, ``name@1`` of a second part."""
        return {str(e): summarise(e.value) for e in self.entries if e.value is not None}

    @property
    def sheet(self) -> Sheet:
        if self.away:
            return Sheet(f"no {self._what} are here: {self.away}", _COLUMNS, [])
        rows = [_row(str(e), self.summaries.get(str(e)), e.why) for e in self.entries]
        count = len(self.summaries)
        return Sheet(f"{count} {self._what.removesuffix('s') if count == 1 else self._what}", _COLUMNS, rows)

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
        """A number for each site and position, of one ``row`` of the batch.

        >>> picture.heatmap(lambda x: x.norm(dim=-1).log10(), names="@resid_post.*")     # doctest: +SKIP
        >>> picture.heatmap("mean", row=3, tokens=ids, decode=tokenizer.decode)          # doctest: +SKIP

        Of all sites that have a value ``(B, S, width)``. ``what``: "norm" (L2), "mean", "std" or "max" (of absolute
        values) over the width, or a function of ``(S, width)`` in float64 that gives ``(S,)``. ``tokens``: ids or
        texts of the whole batch ``(B, S)`` or of the row. Where numbers have both signs, white is 0. Refused sites and
        numbers that are not finite stay blank. ``call``: which, if there are several.
        """
        values, rows = one_row(of_call(self._some(names), call), row)
        numbers = {n: None if v is None else measured(what, v, n) for n, v in values.items()}
        return heat(numbers, title_of(what), row=row, rows=rows, tokens=tokens, decode=decode)

    def attention(
        self,
        layer: Chosen = None,
        *,
        heads: Chosen = None,
        row: int = 0,
        call: int | None = None,
        tokens: Tokens | None = None,
        decode: Callable[[int], str] = str,
    ) -> Figure:
        """Attention patterns of one ``row`` of the batch, a panel a head, query by key.

        >>> with fm.capture(fm.at("pattern")) as acts:                                   # doctest: +SKIP
        ...     fm(input_ids=ids)
        >>> acts.show().attention(layer=5, heads=[0, 3], tokens=ids)                     # doctest: +SKIP

        ``layer`` and ``heads``: one or several; all that were captured without, 64 panels at most. Raises
        ComponentError where no pattern ``(B, heads, S, S)`` was captured.
        """
        patterns, rows = heads_of(of_call(self._some("**"), call), layer, heads, row)
        return attention(patterns, row=row, rows=rows, tokens=tokens, decode=decode)

    def histogram(
        self, names: Pattern | Place = "**", *, together: bool = True, within: float = 0.999, log: bool = False
    ) -> Figure:
        """Densities of values: outlines in one picture, or with ``together=False`` a panel a site.

        >>> picture.histogram("@resid_post.*", log=True)                                 # doctest: +SKIP

        ``within``: the share of the values that is shown, so that a few large ones do not hide the rest; 1 shows all.
        ``log``: of the density.
        """
        if not 0 < within <= 1:
            raise FlexModelError(f"within={within}: expected a share, above 0 and up to 1.", page="bad-argument")
        some = [str(e) for e in self._some(names) if e.value is not None]
        found = {n: self.summaries[n].histogram for n in some if len(self.summaries[n].histogram.counts)}
        if not found:
            raise DeliveryError(f"{names!r}: no value has a finite element.", page="nothing-to-capture")
        return overlaid(found, within, log) if together else multiples(found, within, log)

    def _some(self, names: Pattern | Place) -> list[Entry]:
        if self.away:
            raise DeliveryError(f"no {self._what} are here: {self.away}")
        return chosen(self.entries, names)


def _row(name: str, found: Summary | None, why: str) -> Row:
    if found is None:
        return Row((name,), why=why)
    cells = (
        name,
        str(list(found.shape)),
        found.dtype,
        *map(number, (found.mean, found.std, found.norm, found.low, found.high)),
        f"{found.zeros:.1%}" if found.zeros else "0",
        str(found.nonfinite),
        found.histogram.spark(),
    )
    return Row(cells, alert=found.nonfinite > 0)
