"""``Result``: what an analysis found, as numbers, as a table and as a picture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from flex_model.errors import FlexModelError

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

__all__ = ["Result", "grid", "lines", "long_table", "save_figure"]

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
    if dist.is_initialized() and dist.get_rank() != 0:
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


def _size(figure: Figure) -> dict[str, int]:
    """Of a static picture, in pixels: a heatmap grows with its cells."""
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
    text: Sequence[Sequence[str]] | None = None,
    centred: bool = True,
) -> Figure:
    """A heatmap of ``(rows, columns)``; ``centred``: of differences, so that white is none."""
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise FlexModelError("pictures need plotly; install flex-model[plot].", page="not-installed") from None

    given: dict[str, Any] = {"colorscale": "RdBu_r", "zmid": 0} if centred else {"colorscale": "Blues"}
    if text is not None:
        given |= {"text": [list(row) for row in text], "texttemplate": "%{text}"}
    figure = go.Figure(go.Heatmap(z=values.tolist(), **given))
    figure.update_layout(title=title, xaxis_title=x, yaxis_title=y, template="plotly_white")
    if labels is not None:
        figure.update_xaxes(tickvals=list(range(len(labels))), ticktext=[f"{i} {t}" for i, t in enumerate(labels)])
    return figure


def lines(curves: Mapping[str, tuple[Tensor, Tensor]], *, title: str, x: str, y: str, points: bool = False) -> Figure:
    """Curves by name, each ``(x, y)``; ``points``: not joined."""
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise FlexModelError("pictures need plotly; install flex-model[plot].", page="not-installed") from None

    mode = "markers" if points else "lines+markers"
    figure = go.Figure([go.Scatter(x=a.tolist(), y=b.tolist(), name=n, mode=mode) for n, (a, b) in curves.items()])
    figure.update_layout(title=title, xaxis_title=x, yaxis_title=y, template="plotly_white")
    return figure
