"""Edge attribution: which part of a model is read by which, to what effect on a metric?

Every part writes into the residual stream, and reads the sum of what was written before it. The effect of patching one
edge, from a writer to a reader, is estimated for all edges from two forwards and one backward: what the writer writes
otherwise in the clean run, times the gradient of the corrupted run's metric at what the reader reads. After Syed et
al., "Attribution Patching Outperforms Automated Circuit Discovery" (2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from flex_model import FlexModel, FlexModelError
from flex_model.lens.inputs import Inputs
from flex_model.lens.patching import Metric, length_of, logits_of, metric_of
from flex_model.lens.stream import Layer, Parts, Runs, Stream
from flex_model.result import Result, grid, long_table

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

__all__ = ["EdgeAttribution", "edge_attribution"]


@dataclass(frozen=True, slots=True)
class EdgeAttribution(Result):
    """``scores`` is ``(sources, targets)``: how much the metric of the corrupted run is estimated to change if only
    this target reads what this source writes in the clean run; 0 where there is no edge (``exists``).

    Sources are ``embed``, heads ``a3.h1`` (or blocks ``a3``) and MLPs ``m3``; targets the queries, keys and values of
    heads, ``a3.h1<q>`` (or blocks ``a3``), ``m3`` and ``logits``. Key-value heads are counted for themselves.
    ``clean`` and ``corrupted`` are the metric of the two runs.
    """

    scores: Tensor
    exists: Tensor = field(repr=False)
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    clean: float
    corrupted: float

    def top(self, count: int = 10) -> list[tuple[str, str, float]]:
        """(source, target, score) of the largest scores, whatever their sign."""
        width = len(self.targets)
        ranked = self.scores.abs().masked_fill(~self.exists, -1).flatten()
        best = ranked.topk(min(count, int(self.exists.sum()))).indices.tolist()
        return [(self.sources[i // width], self.targets[i % width], float(self.scores.flatten()[i])) for i in best]

    def to_dataframe(self) -> DataFrame:
        """source, target, score of every edge there is."""
        table = long_table(("source", "target"), score=self.scores)
        for name, nodes in (("source", self.sources), ("target", self.targets)):
            table[name] = [nodes[i] for i in table[name]]
        return table[self.exists.flatten().tolist()].reset_index(drop=True)

    def plot(self) -> Figure:
        title = "Edges: estimated change of the metric by patching one of them"
        shown = self.scores.masked_fill(~self.exists, torch.nan)
        figure = grid(shown, title=title, x="target", y="source")
        figure.update_traces(x=list(self.targets), y=list(self.sources))  # many: plotly leaves out what has no room
        figure.update_xaxes(type="category", showgrid=False)
        figure.update_yaxes(type="category", showgrid=False, autorange="reversed")
        return figure


def edge_attribution(
    fm: FlexModel, clean: Inputs, corrupted: Inputs, metric: Metric, *, parts: Parts = "head"
) -> EdgeAttribution:
    """Estimate the effect of patching every edge between parts of the model, from the clean run.

    >>> found = edge_attribution(fm, clean, corrupted, difference)                       # doctest: +SKIP
    >>> found.top(20), found.plot()                                                      # doctest: +SKIP

    ``clean`` and ``corrupted`` are token ids of one shape, or the model's keywords with them; ``metric`` takes the full
    logits (B, S, V) and returns a number. ``parts="block"``: attention is one part a layer, not one a head; needed
    where a norm comes between heads and stream (Gemma 2). Two forwards and one backward, whose gradients parameters
    that require them get; every rank holds what all sources write, (sources, B, S, D). Collective; every rank gets the
    result. Raises ComponentError where attention and MLP have no norms of their own to read through, and EngineError
    in pipelines.
    """
    if parts not in get_args(Parts):
        raise FlexModelError(f"parts={parts!r} is unknown; expected 'head' or 'block'.", page="bad-argument")
    length_of(clean, corrupted)
    stream = Stream(fm, parts)
    with torch.no_grad(), fm.capture(*stream.writers) as good:
        before = metric_of(fm, clean, metric)
    with (
        fm.capture(*stream.writers) as bad,
        fm.capture(stream.norms, hook_type="forward_pre") as read,
        fm.capture(*stream.readers, grad=True) as grads,
    ):
        base = metric(logits_of(fm, corrupted))
        base.backward()
    with torch.no_grad():
        edges = _followed(stream, Runs(good, bad, read, grads))
    return edges.result(float(before), float(base.detach()))


def _followed(stream: Stream, runs: Runs) -> _Edges:
    edges = _Edges()
    edges.write(["embed"], runs.change(stream.first.key)[None])
    for index in range(stream.count):
        layer = Layer(stream, runs, index)
        edges.read(*layer.attention_reads())
        if stream.side_by_side:
            edges.read(*layer.mlp_reads())
        edges.write(*layer.attention_writes())
        if not stream.side_by_side:
            edges.read(*layer.mlp_reads())
        edges.write([f"m{index}"], runs.change(f"@mlp_out.{index}")[None])
    edges.read(["logits"], runs.gradient(stream.last.key)[None])
    return edges


class _Edges:
    """Edges as they are met along the stream: a reader reads what has been written so far."""

    def __init__(self) -> None:
        self.sources: list[str] = []
        self.targets: list[str] = []
        self._written: list[Tensor] = []  # (n, N * D) each, N = B * S
        self._columns: list[Tensor] = []  # (sources so far, n) each

    def write(self, names: Sequence[str], change: Tensor) -> None:
        """``change`` (n, N, D): what these sources write in the clean run, less what they write in the corrupted."""
        self.sources += names
        self._written.append(change.flatten(1))

    def read(self, names: Sequence[str], gradient: Tensor) -> None:
        """``gradient`` (n, N, D) of the metric, at the stream as these targets read it."""
        self.targets += names
        self._columns.append(torch.cat([w @ gradient.flatten(1).T for w in self._written]).cpu())

    def result(self, clean: float, corrupted: float) -> EdgeAttribution:
        scores = torch.zeros(len(self.sources), len(self.targets), dtype=self._columns[0].dtype)
        exists = torch.zeros_like(scores, dtype=torch.bool)
        at = 0
        for column in self._columns:
            rows, width = column.shape
            scores[:rows, at : at + width] = column
            exists[:rows, at : at + width] = True
            at += width
        return EdgeAttribution(scores, exists, tuple(self.sources), tuple(self.targets), clean, corrupted)
