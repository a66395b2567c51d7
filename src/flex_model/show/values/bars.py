"""Histograms of sites: outlines over one another, or bars in small multiples."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, sqrt
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flex_model.errors import FlexModelError
from flex_model.result import graph_objects, lines, panels
from flex_model.show.values.histogram import Histogram
from flex_model.show.values.labels import short_names

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["multiples", "overlaid"]

_BINS = 100
_MOST = 64  # panels


def overlaid(found: Mapping[str, Histogram], within: float, log: bool) -> Figure:
    """Densities, so that sites whose bins or sizes are not the same can be compared."""
    names, of = short_names(list(found))
    curves = {n: _density(h, within) for n, h in zip(names, found.values(), strict=True)}
    figure = lines(curves, title=_title(of, within), x="value", y="density")
    figure.update_traces(mode="lines", line_shape="hv")
    if "*" in of:  # layers have an order, and so have their colours
        from plotly.colors import sample_colorscale

        colours = sample_colorscale("Viridis", [0.95 * i / max(1, len(names) - 1) for i in range(len(names))])
        for trace, colour in zip(figure.data, colours, strict=True):
            trace.line.color = colour
        figure.update_layout(legend_title_text="layer")
    return _logarithmic(figure) if log else figure


def multiples(found: Mapping[str, Histogram], within: float, log: bool) -> Figure:
    """A panel a site."""
    go = graph_objects()
    if len(found) > _MOST:
        raise FlexModelError(
            f"expected at most {_MOST} sites in small multiples, found {len(found)}; choose some with names=.",
            page="bad-argument",
        )
    bars = {}
    for name, histogram in found.items():
        x, y = _density(histogram, within)
        width = x[1] - x[0]
        bars[name] = go.Bar(
            x=(x[:-1] + width / 2).tolist(), y=y[:-1].tolist(), width=float(width), marker_color="#3b6fb6"
        )
    columns = min(4, ceil(sqrt(len(bars))))
    figure = panels(bars, title=_title("", within), x="value", y="density", columns=columns, own_axes=True)
    figure.update_layout(showlegend=False, bargap=0)
    return _logarithmic(figure) if log else figure


def _logarithmic(figure: Figure) -> Figure:
    out: Figure = figure.update_yaxes(type="log", exponentformat="power", dtick=1)
    return out


def _density(histogram: Histogram, within: float) -> tuple[Tensor, Tensor]:
    """Edges, and the density from each on, 0 behind the last."""
    total = int(histogram.counts.sum())
    shown = histogram.within(within).coarse(_BINS)
    density = shown.counts.double() / (total * shown.width)
    return shown.edges, torch.cat([density, density.new_zeros(1)])


def _title(of: str, within: float) -> str:
    share = "" if within == 1 else f", the middle {100 * within:.6g}% of them"
    return f"Values{f' of {of}' if of else ''}{share}"
