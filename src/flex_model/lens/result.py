"""``Result``: what an analysis found, as numbers, as a table and as a picture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flex_model.errors import DeliveryError, FlexModelError

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

    from flex_model.core.captured import Captured

__all__ = ["Result", "grid", "lines", "long_table", "whole"]


class Result(ABC):
    """Results are small dataclasses of tensors in host memory, the same on every rank."""

    @abstractmethod
    def to_dataframe(self) -> DataFrame:
        """One row a number, with the names of its places."""

    @abstractmethod
    def plot(self) -> Figure:
        """A plotly figure; ``figure.write_html(path)`` or ``figure.show()``."""


def whole(acts: Captured, key: str) -> Tensor:
    """A captured value that is one tensor, which it is not where ranks' inputs differ in length."""
    value = acts[key]
    if isinstance(value, Tensor):
        return value
    raise DeliveryError(
        f"{key!r} came in parts, because ranks' inputs have other lengths; pad them to one.", page="no-rectangle"
    )


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
