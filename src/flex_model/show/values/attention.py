"""Attention patterns as small multiples: a panel a head, query by key."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil, sqrt
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flex_model.errors import ComponentError, DeliveryError, FlexModelError
from flex_model.result import graph_objects, numbered, panels, ticks
from flex_model.show.values.entry import Value
from flex_model.show.values.labels import Tokens, number_of, token_labels

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["attention", "heads_of"]

Chosen = int | Sequence[int] | None
_MOST = 64  # panels


def heads_of(values: Mapping[str, Value], layer: Chosen, heads: Chosen, row: int) -> tuple[dict[str, Tensor], int]:
    """{name of a panel: query by key} of one row, and how many rows there are."""
    layers = _layers(values)
    found, rows = {}, 0
    for number in _picked(sorted(layers), layer, "layer"):
        for head in _picked(sorted(layers[number]), heads, "head"):
            pattern = layers[number][head]
            rows = len(pattern)
            if not -rows <= row < rows:
                raise FlexModelError(f"row={row}: expected one of the {rows} rows of the batch.", page="bad-argument")
            found[f"layer {number}, head {head}"] = pattern[row].detach().float().cpu()
    if len(found) > _MOST:
        raise FlexModelError(
            f"expected at most {_MOST} heads in a picture, found {len(found)}; choose with layer= and heads=.",
            page="bad-argument",
        )
    return found, rows


def _layers(values: Mapping[str, Value]) -> dict[int, dict[int, Tensor]]:
    """By layer and head: (B, queries, keys)."""
    places = {n: v for n, v in values.items() if n.startswith("@pattern.")}
    found: dict[int, dict[int, Tensor]] = {}
    for name, value in (places or values).items():
        number = number_of(name)
        if places and len(value.parts) != 1:
            why = value.why or "it came in parts, because ranks' inputs have other lengths; pad them to one"
            raise DeliveryError(f"{name!r} cannot be drawn: {why}.", page="" if value.why else "no-rectangle")
        if number is not None and len(value.parts) == 1 and (places or _is_pattern(value.parts[0])):
            found.setdefault(number, {}).update(_by_head(name, value.parts[0]))
    if not found:
        raise ComponentError(
            "no attention pattern was captured; capture fm.at('pattern') of a model with eager attention.",
            page="attention-unknown",
        )
    return found


def _is_pattern(value: Tensor) -> bool:
    return value.dim() == 4 and value.is_floating_point()


def _by_head(name: str, pattern: Tensor) -> dict[int, Tensor]:
    """``@pattern.5.0+2`` says which heads it has."""
    said = name.split(".")[2:] if name.startswith("@pattern.") else []
    if not said:
        return dict(enumerate(pattern.unbind(1)))
    heads = [int(head) for head in said[0].split("+")]
    return dict(zip(heads, pattern.unbind(1) if pattern.dim() == 4 else [pattern], strict=True))


def _picked(there: Sequence[int], asked: Chosen, what: str) -> list[int]:
    if asked is None:
        return list(there)
    wanted = [asked] if isinstance(asked, int) else list(asked)
    picked = [w if w >= 0 else max(there) + 1 + w for w in wanted]
    missing = next((w for w, p in zip(wanted, picked, strict=True) if p not in there), None)
    if missing is not None or not wanted:
        raise FlexModelError(
            f"{what} {missing} was not captured; expected some of {', '.join(map(str, there))}.", page="bad-argument"
        )
    return picked


def attention(
    patterns: Mapping[str, Tensor], *, row: int, rows: int, tokens: Tokens | None, decode: Callable[[int], str]
) -> Figure:
    """All panels on one scale, from 0 to 1."""
    go = graph_objects()
    first = next(iter(patterns.values()))
    labels = token_labels(tokens, decode, row=row % rows, rows=rows, length=first.shape[-1])
    common: dict[str, Any] = {"coloraxis": "coloraxis", "hovertemplate": "query %{y}<br>key %{x}<br>%{z:.3f}"}
    maps = {name: go.Heatmap(z=pattern.tolist(), **common) for name, pattern in patterns.items()}
    columns = min(4, ceil(sqrt(len(maps))))
    figure = panels(maps, title=f"Attention, row {row % rows}", x="key", y="query", columns=columns)
    figure.update_layout(coloraxis={"colorscale": "Blues", "cmin": 0, "cmax": 1, "colorbar_title": "p"})
    figure.update_yaxes(autorange="reversed")
    if labels is not None:
        marks = ticks(numbered(labels), most=32)
        figure.update_xaxes(**marks, tickfont_size=10, tickangle=-90).update_yaxes(tickfont_size=10)
        if first.shape[-2] == first.shape[-1]:
            figure.update_yaxes(**marks)
    return figure
