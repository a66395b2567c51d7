"""Heatmaps of sites by positions: one number for each token of one row of the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flex_model.errors import DeliveryError, FlexModelError, NameNotFoundError
from flex_model.result import grid
from flex_model.show.values.entry import Value
from flex_model.show.values.labels import Tokens, short_names, token_labels

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["MEASURES", "Measure", "heat", "measured", "one_row", "title_of"]

Measure = str | Callable[[Tensor], Tensor]
MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "norm": lambda x: x.norm(dim=-1),
    "mean": lambda x: x.mean(-1),
    "std": lambda x: x.std(-1, correction=0),
    "max": lambda x: x.abs().amax(-1),
}

_TITLES = {"norm": "L2 norm", "mean": "Mean", "std": "Standard deviation", "max": "Largest absolute value"}


def title_of(what: Measure) -> str:
    """Of a function its name.

    >>> title_of("norm"), title_of(abs), title_of(lambda x: x[..., 0])
    ('L2 norm', 'abs', 'measure')
    """
    if isinstance(what, str):
        return _TITLES.get(what, what)
    name = getattr(what, "__name__", "<")
    return "measure" if "<" in name else name.replace("_", " ")


def one_row(values: Mapping[str, Value], row: int) -> tuple[dict[str, Tensor | None], int]:
    """Of every site whose value is ``(B, S, width)``, this row in float64, and None where it was refused; and B."""
    fitting = {n: v for n, v in values.items() if v.why or all(t.dim() == 3 and t.is_floating_point() for t in v.parts)}
    sizes = {n: tuple((len(t), t.shape[1]) for t in v.parts) for n, v in fitting.items() if not v.why}
    if not sizes:
        raise _none(values)
    first = next(iter(sizes))
    other = next((n for n in sizes if sizes[n] != sizes[first]), None)
    if other is not None:
        raise FlexModelError(
            f"expected sites of one batch and length, found {_said(sizes[first])} of {first!r} and "
            f"{_said(sizes[other])} of {other!r}; name those that go together with names=.",
            page="bad-argument",
        )
    rows = sum(count for count, _ in sizes[first])
    if not -rows <= row < rows:
        raise FlexModelError(f"row={row}: expected one of the {rows} rows of the batch.", page="bad-argument")
    found = {n: [r for part in v.parts for r in part.detach().unbind()] for n, v in fitting.items()}
    return {n: None if fitting[n].why else r[row].double().cpu() for n, r in found.items()}, rows


def _none(values: Mapping[str, Value]) -> FlexModelError:
    refused = next((f"{n!r} has no value: {v.why}" for n, v in values.items() if v.why), "")
    if refused:
        return DeliveryError(refused)
    few = ", ".join(map(repr, [*values][:5]))
    return NameNotFoundError(
        f"expected a value (batch, positions, width), found none among {few}; name sites that have one with names=.",
        page="not-captured",
    )


def _said(sizes: Sequence[tuple[int, int]]) -> str:
    return " and ".join(f"({a}, {b})" for a, b in sizes)


def measured(what: Measure, value: Tensor, name: str) -> Tensor:
    """``(S, width)`` to ``(S,)``."""
    if isinstance(what, str):
        if what not in MEASURES:
            raise FlexModelError(
                f"what={what!r} is unknown; expected {', '.join(map(repr, MEASURES))} or a function.",
                page="bad-argument",
            )
        return MEASURES[what](value)
    found = what(value)
    if not isinstance(found, Tensor) or found.shape != value.shape[:-1]:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise FlexModelError(
            f"what= gave {got} for the value {tuple(value.shape)} of {name!r}; expected a number a position, "
            f"{tuple(value.shape[:-1])}.",
            page="bad-argument",
        )
    return found.double()


def heat(
    numbers: Mapping[str, Tensor | None],
    title: str,
    *,
    row: int,
    rows: int,
    tokens: Tokens | None,
    decode: Callable[[int], str],
) -> Figure:
    """White is zero where there are numbers of both signs; else pale is the least."""
    known = [n for n in numbers.values() if n is not None]
    length = len(known[0])
    labels = token_labels(tokens, decode, row=row % rows, rows=rows, length=length)
    names, of = short_names(list(numbers))
    shown = [f"{n} (refused)" if v is None else n for n, v in zip(names, numbers.values(), strict=True)]
    z = torch.stack([torch.full((length,), torch.nan) if n is None else n for n in numbers.values()]).double()
    z[~z.isfinite()] = torch.nan  # blank
    both = bool((z < 0).any()) and bool((z > 0).any())
    what = f"{title}{f' of {of}' if of else ''}, row {row % rows}"
    y = "layer" if "*" in of else "site"
    return grid(z, title=what, x="position", y=y, labels=labels, rows=shown, centred=both)
