"""Activation patching: which values carry what makes a model answer one prompt and not another?

A run on corrupted inputs is repeated with one value at a time taken from the clean run; a metric says how much of the
clean behaviour comes back. Zhang and Nanda, "Towards Best Practices of Activation Patching" (2023). Attribution
patching estimates all of it from one gradient: Nanda, "Attribution Patching" (2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from flex_model import FlexModel, FlexModelError, edits
from flex_model.components.heads import Heads
from flex_model.lens.inputs import Inputs, keywords
from flex_model.lens.whole import whole
from flex_model.progress import progress_bar
from flex_model.result import Result, grid, long_table

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

__all__ = ["Patching", "activation_patching", "attribution_patching"]

Metric = Callable[[Tensor], Tensor]
Over = Literal["position", "head"]


@dataclass(frozen=True, slots=True)
class Patching(Result):
    """``effect`` is ``(layers, positions)`` or ``(layers, heads)``: how much the metric of the corrupted run changes;
    ``clean`` and ``corrupted`` are the metric of the two runs."""

    effect: Tensor
    clean: float
    corrupted: float
    component: str
    over: Over

    @property
    def restored(self) -> Tensor:
        """The effect as a share of the difference between the two runs: 1 restores the clean metric."""
        return self.effect / (self.clean - self.corrupted)

    def to_dataframe(self) -> DataFrame:
        """layer, position or head, effect, restored."""
        return long_table(("layer", self.over), effect=self.effect, restored=self.restored)

    def plot(self, labels: Sequence[str] | None = None) -> Figure:
        """``labels``: a word for each position, such as its token."""
        title = f"Patching {self.component!r}: share of the clean metric that is restored"
        return grid(self.restored, title=title, x=self.over, y="layer", labels=labels)


def activation_patching(
    fm: FlexModel,
    clean: Inputs,
    corrupted: Inputs,
    metric: Metric,
    *,
    component: str = "resid_pre",
    over: Over = "position",
    progress: bool | None = None,
) -> Patching:
    """Patch one component, layer by layer and position by position (or head by head), from the clean run.

    >>> def difference(logits):                                                          # doctest: +SKIP
    ...     return (logits[:, -1, mary] - logits[:, -1, john]).mean()
    >>> found = activation_patching(fm, clean, corrupted, difference)                    # doctest: +SKIP
    >>> found.restored.argmax(), found.plot()                                            # doctest: +SKIP

    ``clean`` and ``corrupted`` are token ids of one shape, or the model's keywords with them; ``metric`` takes the full
    logits (B, S, V) and returns a number. ``component`` is one that ``fm.at`` knows; with ``over="head"`` one with
    heads, such as ``"z"``. Clean values stay on their ranks. One forward a cell. Collective; every rank gets the
    result.
    """
    places, width = _cells(fm, component, over, clean, corrupted)
    with torch.no_grad(), fm.capture(fm.at(component), deliver="all" if over == "head" else "local") as acts:
        before = metric_of(fm, clean, metric)
    with torch.no_grad():
        base = metric_of(fm, corrupted, metric)
    effect = torch.zeros(len(places.keys), width, dtype=torch.float64)
    with progress_bar(effect.numel(), "patching", progress) as step, torch.no_grad():
        for row, key in enumerate(places.keys):
            for column in range(width):
                where, values = _patch(fm, component, over, acts, key, row, column)
                with fm.edit(where, values):
                    effect[row, column] = metric_of(fm, corrupted, metric) - base
                step()
    return Patching(effect, float(before), float(base), component, over)


def attribution_patching(
    fm: FlexModel,
    clean: Inputs,
    corrupted: Inputs,
    metric: Metric,
    *,
    component: str = "resid_pre",
    over: Over = "position",
) -> Patching:
    """The linear estimate of ``activation_patching``: (clean - corrupted) x gradient of the metric, summed over the
    batch and the width. Two forwards and one backward, whatever the number of cells.

    Under data parallelism the metric is of the whole batch all the same: it gets the full logits.
    """
    places, _ = _cells(fm, component, over, clean, corrupted)
    with torch.no_grad(), fm.capture(places) as good:
        before = metric_of(fm, clean, metric)
    with fm.capture(places, grad=True) as bad:
        base = metric(logits_of(fm, corrupted))
        base.backward()
    rows = []
    for key in places.keys:
        step = whole(good, key).double() - whole(bad, key).double()  # (B, S, [heads,] width)
        product = step * bad.grad(key).double()  # type: ignore[union-attr]
        dim = 2 if over == "head" else 1
        rows.append(product.sum([d for d in range(product.dim()) if d != dim]))
    return Patching(torch.stack(rows), float(before), float(base.detach()), component, over)


def _cells(fm: FlexModel, component: str, over: Over, clean: Inputs, corrupted: Inputs) -> tuple[Any, int]:
    """The places, and how many positions or heads there are."""
    if over not in ("position", "head"):
        raise FlexModelError(f"over={over!r} is unknown; expected 'position' or 'head'.", page="bad-argument")
    length = length_of(clean, corrupted)
    places = fm.at(component)
    if over == "position":
        return places, length
    selection = places.spots[0].select
    if not isinstance(selection, Heads) or component == "pattern":
        raise FlexModelError(
            f"{component!r} has no heads to patch one by one; use over='position', or component 'q', 'k', 'v' or 'z'.",
            page="bad-argument",
        )
    return places, selection.count


def length_of(clean: Inputs, corrupted: Inputs) -> int:
    """How long the token ids are, which must have one shape."""
    ids, others = (x.get("input_ids", x.get("inputs_embeds")) for x in map(keywords, (clean, corrupted)))
    if ids is None or others is None or ids.shape[:2] != others.shape[:2]:
        shapes = [None if t is None else tuple(t.shape) for t in (ids, others)]
        raise FlexModelError(
            f"clean and corrupted inputs need input_ids of one shape, got {shapes[0]} and {shapes[1]}; "
            f"pad the prompts to the same length.",
            page="bad-argument",
        )
    return int(ids.shape[1])


def _patch(fm: FlexModel, component: str, over: Over, acts: Any, key: str, row: int, column: int) -> tuple[Any, Any]:
    if over == "position":
        return fm.at(component, row), edits.patch(acts.ref(key), positions=[column])
    return fm.at(component, row, head=column), edits.patch(whole(acts, key)[:, :, column])


def logits_of(fm: FlexModel, inputs: Inputs) -> Tensor:
    output = fm.full_output(fm(**keywords(inputs)))
    logits: Tensor = output.logits if hasattr(output, "logits") else output
    return logits


def metric_of(fm: FlexModel, inputs: Inputs, metric: Metric) -> Tensor:
    return metric(logits_of(fm, inputs)).detach().double().cpu()
