"""``Result``: what an analysis found, as numbers, as a table and as a picture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from flex_model.errors import FlexModelError

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

__all__ = [
    "Result",
    "as_label",
    "graph_objects",
    "grid",
    "lines",
    "long_table",
    "numbered",
    "panels",
    "save_figure",
    "ticks",
    "writes",
]

_STATIC = (".png", ".svg", ".pdf")


class Result(ABC):
    """Results are small dataclasses of tensors in host memory, the same on every rank."""

    @abstractmethod
    def to_dataframe(self) -> DataFrame:
        """One row a number, with the names of its places."""

    @abstractmethod
    def plot(self) -> Figure:
        """A plotly figure; ``figure.show()``."""

    def save_plot(self, path: str | Path) -> Path:
        """Write the picture; see ``save_figure``.

        >>> found.save_plot("found.png")                                                 # doctest: +SKIP
        """
        return save_figure(self.plot(), path)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as ``.html``, ``.png``, ``.svg`` or ``.pdf``, by the suffix of ``path``.

    >>> save_figure(found.plot("entropy"), "entropy.png")                           # doctest: +SKIP

    All ranks may call it; the lowest writes. Static pictures are drawn by kaleido in a Chromium, which takes seconds.
    Raises FlexModelError where one of them is missing.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".html", *_STATIC):
        raise FlexModelError(
            f"expected a path that ends in .html, {', '.join(_STATIC)}, got {path.name!r}.", page="bad-argument"
        )
    if not writes():
        return path
    if suffix == ".html":
        figure.write_html(path)
        return path
    if find_spec("kaleido") is None:
        raise FlexModelError(
            f"a {suffix} needs kaleido; install flex-model[plot], or save as .html.", page="not-installed"
        )
    try:
        figure.write_image(path, scale=2, **_size(figure))
    except RuntimeError as error:  # plotly's for a browser that is not found, kaleido's for one that does not start
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise FlexModelError(
            f"a {suffix} needs Chromium or Chrome ({why.rstrip('.')}); install it (apt-get install chromium, or "
            f"plotly_get_chrome), or save as .html.",
            page="not-installed",
        ) from error
    return path


def writes() -> bool:
    """Whether this rank writes files: the lowest of all."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _size(figure: Figure) -> dict[str, int]:
    """Of a static picture, in pixels: its own, or a heatmap's, which grows with its cells."""
    if figure.layout.width and figure.layout.height:
        return {"width": figure.layout.width, "height": figure.layout.height}
    cells = getattr(figure.data[0], "z", None) if figure.data else None
    rows, columns = (0, 0) if cells is None or not len(cells) else (len(cells), len(cells[0]))
    return {"width": min(2400, max(700, 200 + 18 * columns)), "height": min(2400, max(450, 180 + 18 * rows))}


def long_table(names: Sequence[str], **columns: Tensor) -> DataFrame:
    """``columns`` of one shape, an element a row, beside its index along each dim."""
    try:
        import pandas
    except ImportError:
        raise FlexModelError("tables need pandas; install flex-model[plot].", page="not-installed") from None

    shape = next(iter(columns.values())).shape
    index = pandas.MultiIndex.from_product([range(s) for s in shape], names=list(names))
    return pandas.DataFrame({k: v.flatten().tolist() for k, v in columns.items()}, index=index).reset_index()


def grid(
    values: Tensor,
    *,
    title: str,
    x: str,
    y: str,
    labels: Sequence[str] | None = None,
    rows: Sequence[str] | None = None,
    text: Sequence[Sequence[str]] | None = None,
    centred: bool = True,
) -> Figure:
    """A heatmap of ``(rows, columns)``; ``centred``: of differences, so that white is none. ``labels`` of the columns,
    which are numbered, and of the ``rows``."""
    go = graph_objects()
    given: dict[str, Any] = {"colorscale": "RdBu_r", "zmid": 0} if centred else {"colorscale": "Blues"}
    if text is not None:
        given |= {"text": [list(map(as_label, row)) for row in text], "texttemplate": "%{text}"}
    figure = go.Figure(go.Heatmap(z=values.tolist(), **given))
    _titled(figure, title, x, y)
    if labels is not None:
        figure.update_xaxes(**ticks(numbered(labels)))
    if rows is not None:
        figure.update_yaxes(**ticks(rows))
    return figure


def lines(curves: Mapping[str, tuple[Tensor, Tensor]], *, title: str, x: str, y: str, points: bool = False) -> Figure:
    """Curves by name, each ``(x, y)``; ``points``: not joined."""
    go = graph_objects()
    mode = "markers" if points else "lines+markers"
    figure = go.Figure(
        [go.Scatter(x=a.tolist(), y=b.tolist(), name=as_label(n), mode=mode) for n, (a, b) in curves.items()]
    )
    return _titled(figure, title, x, y)


def panels(
    traces: Mapping[str, Any],
    *,
    title: str,
    x: str,
    y: str,
    columns: int,
    own_axes: bool = False,
    size: int = 260,
) -> Figure:
    """Small multiples: a trace of plotly's each, by name, on axes that all share or on ``own_axes``; ``size``: of a
    panel, in pixels."""
    graph_objects()
    from plotly.subplots import make_subplots

    rows, columns = -(-len(traces) // columns), min(columns, len(traces))
    wide, high = (70, 70) if own_axes else (24, 36)
    figure = make_subplots(
        rows,
        columns,
        shared_xaxes=not own_axes,
        shared_yaxes=not own_axes,
        subplot_titles=[as_label(n) for n in traces],
        horizontal_spacing=wide / ((size + wide) * columns),
        vertical_spacing=high / ((size + high) * rows),
    )
    for i, trace in enumerate(traces.values()):
        figure.add_trace(trace, row=i // columns + 1, col=i % columns + 1)
    _titled(figure, title, "", "")
    figure.update_xaxes(title_text=as_label(x), row=rows)
    figure.update_yaxes(title_text=as_label(y), col=1)
    figure.update_annotations(font_size=13)
    return figure.update_layout(width=140 + (size + wide) * columns, height=170 + (size + high) * rows)


def as_label(label: str) -> str:
    """A label that plotly shows as it is: it takes some HTML and TeX for markup, and swallows the breaks of lines.

    >>> as_label("<s>"), as_label("$x$")
    ('&lt;s&gt;', '&#36;x&#36;')
    """
    shown = label.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    return escape(shown, quote=False).replace("$", "&#36;")


def numbered(labels: Sequence[str]) -> list[str]:
    return [f"{i} {label}" for i, label in enumerate(labels)]


def ticks(labels: Sequence[str], *, most: int = 64) -> dict[str, Any]:
    """An axis with these labels at 0, 1, ...; with some of them, evenly, where there are more than fit."""
    step = -(-len(labels) // most) or 1
    places = list(range(0, len(labels), step))
    return {"tickvals": places, "ticktext": [as_label(labels[i]) for i in places]}


def graph_objects() -> Any:
    """plotly's; raises FlexModelError where it is not installed."""
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise FlexModelError("pictures need plotly; install flex-model[plot].", page="not-installed") from None
    return go


def _titled(figure: Any, title: str, x: str, y: str) -> Figure:
    titled: Figure = figure.update_layout(
        title=as_label(title), xaxis_title=as_label(x), yaxis_title=as_label(y), template="plotly_white"
    )
    return titled
