"""Induction heads: attention heads that find where a token occurred before, and look at what came after it.

Random tokens repeated once show them: nothing else helps to predict the second copy. After Olsson et al.,
"In-context Learning and Induction Heads" (2022). For transformers' decoders, under any parallelism.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flex_model import FlexModel, edits
from flex_model.lens.attention import per_head
from flex_model.lens.whole import whole
from flex_model.result import Result, grid, long_table

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure
    from rich.table import Table

__all__ = [
    "CopyLoss",
    "Head",
    "Induction",
    "induction_scores",
    "measure",
    "remove_heads",
    "repeated_loss",
    "repeated_tokens",
    "top_heads",
]


class Head(NamedTuple):
    """One attention head; both numbers count from 0."""

    layer: int
    head: int


@dataclass(frozen=True, slots=True)
class CopyLoss:
    """Mean next-token loss, in nats, within the first copy of the tokens and within the second."""

    first: float
    second: float


@dataclass(frozen=True, slots=True)
class Induction(Result):
    """What ``measure`` found.

    ``scores`` (layers, heads) and ``logits`` (B, S, vocabulary) are the unedited model's; ``loss_without`` is
    the loss without the ``removed`` heads, ``loss_without_random`` without as many drawn from the others.
    """

    scores: Tensor
    loss: CopyLoss
    removed: tuple[Head, ...]
    loss_without: CopyLoss
    random: tuple[Head, ...]
    loss_without_random: CopyLoss
    logits: Tensor = field(repr=False)

    def difference(self, other: Induction) -> dict[str, float]:
        """The largest absolute difference from another run of the same measurement, by kind of result."""
        mine, theirs = (
            [v for loss in (x.loss, x.loss_without, x.loss_without_random) for v in asdict(loss).values()]
            for x in (self, other)
        )
        return {
            "scores": float((self.scores - other.scores).abs().max()),
            "losses": max(abs(a - b) for a, b in zip(mine, theirs, strict=True)),
            "logits": float((self.logits - other.logits).abs().max()),
        }

    def table(self, count: int = 5) -> Table:
        """The top heads as a rich table."""
        from rich.table import Table

        table = Table("layer", "head", "score", title="Induction heads", title_justify="left")
        for column in table.columns:
            column.justify = "right"
        for head, score in top_heads(self.scores, count):
            table.add_row(str(head.layer), str(head.head), f"{score:.3f}")
        return table

    def to_dataframe(self) -> DataFrame:
        """layer, head, score, removed."""
        removed = torch.zeros_like(self.scores, dtype=torch.bool)
        for layer, head in self.removed:
            removed[layer, head] = True
        return long_table(("layer", "head"), score=self.scores, removed=removed)

    def plot(self) -> Figure:
        """All scores, the removed heads outlined."""
        title = "Attention to the token after the previous occurrence (outlined: removed)"
        figure = grid(self.scores.T, title=title, x="layer", y="head", centred=False)
        for layer, head in self.removed:
            corners = {"x0": layer - 0.5, "x1": layer + 0.5, "y0": head - 0.5, "y1": head + 0.5}
            figure.add_shape(type="rect", line={"color": "#d1495b", "width": 2}, **corners)
        return figure

    def save_json(self, path: str | Path) -> Path:
        """Everything but the logits."""
        content: dict[str, Any] = {
            "loss": asdict(self.loss),
            "removed": [head._asdict() for head in self.removed],
            "loss_without": asdict(self.loss_without),
            "random": [head._asdict() for head in self.random],
            "loss_without_random": asdict(self.loss_without_random),
            "scores": self.scores.tolist(),
        }
        Path(path).write_text(json.dumps(content, indent=1) + "\n")
        return Path(path)


def repeated_tokens(batch: int, length: int, seed: int = 0, *, low: int = 500, high: int = 15_000) -> Tensor:
    """Random token ids of ``[low, high)``, each row repeated once: ``(batch, 2 * length)``."""
    once = torch.randint(low, high, (batch, length), generator=torch.Generator().manual_seed(seed))
    return torch.cat([once, once], dim=1)


@torch.no_grad()
def repeated_loss(logits: Tensor, ids: Tensor) -> CopyLoss:
    """The loss of ``logits`` (B, 2L, vocabulary) on repeated tokens (B, 2L).

    Each copy's first token is left out: nothing before it says what it will be.
    """
    length = ids.shape[1] // 2
    losses = cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    losses = losses.view(len(ids), -1)
    return CopyLoss(float(losses[:, : length - 1].mean()), float(losses[:, length:].mean()))


def induction_scores(fm: FlexModel, ids: Tensor) -> Tensor:
    """How much each head attends to the token after the previous occurrence: ``(layers, heads)``.

    >>> scores = induction_scores(fm, repeated_tokens(2, 50))   # doctest: +SKIP

    The mean of the attention probabilities ``length - 1`` places back. The model must return them, which in
    transformers takes ``attn_implementation="eager"``. Collective; every rank gets the scores.
    """
    return _observe(fm, ids)[0]


def top_heads(scores: Tensor, count: int) -> list[tuple[Head, float]]:
    """The heads with the highest scores (layers, heads), best first."""
    values, places = scores.flatten().topk(min(count, scores.numel()))
    width = scores.shape[1]
    return [(Head(*divmod(int(i), width)), float(v)) for i, v in zip(places, values, strict=True)]


@contextmanager
def remove_heads(fm: FlexModel, heads: Iterable[tuple[int, int]]) -> Iterator[None]:
    """Zero the outputs of (layer, head) pairs while the block runs, where the output projection takes them.

    >>> with remove_heads(fm, [(18, 6), (17, 3)]):   # doctest: +SKIP
    ...     fm(ids)

    Raises ComponentError where the model has no such head.
    """
    by_layer: dict[int, list[int]] = defaultdict(list)
    for layer, head in dict.fromkeys(heads):
        by_layer[layer].append(head)
    places = [fm.at("z", layer, head=inside) for layer, inside in by_layer.items()]
    with ExitStack() as stack:
        for place in places:
            stack.enter_context(fm.edit(place, edits.zero()))
        yield


def measure(
    fm: FlexModel, ids: Tensor, *, top: int = 5, progress: Callable[[str], object] = lambda step: None
) -> Induction:
    """Score every head on repeated tokens, then remove the ``top`` best and see what that does to the loss.

    As many of the other heads, drawn at random, are removed for comparison. ``progress`` is told each step before it
    starts. Collective; the result is whole on every rank.
    """
    progress("attention of every layer")
    scores, logits = _observe(fm, ids)
    batch = fm.full_batch(ids)
    heads = tuple(head for head, _ in top_heads(scores, top))
    others = [head for head, _ in top_heads(scores, scores.numel())[len(heads) :]]
    random = tuple(Random(0).sample(sorted(others), min(len(heads), len(others))))
    losses = []
    for removed in (heads, random):
        progress(f"loss without {len(removed)} heads")
        with remove_heads(fm, removed):
            losses.append(repeated_loss(_logits(fm, ids), batch))
    return Induction(scores, repeated_loss(logits, batch), heads, losses[0], random, losses[1], logits.cpu())


def _observe(fm: FlexModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and logits of one forward."""
    place = fm.at("pattern")
    back = 1 - ids.shape[1] // 2
    after_previous = per_head(lambda p: p.diagonal(back, -2, -1).double().mean(-1))
    with fm.capture(place, select=after_previous) as acts:
        logits = _logits(fm, ids)
    return torch.stack([whole(acts, key).mean(0).float() for key in place.keys]), logits


@torch.no_grad()
def _logits(fm: FlexModel, ids: Tensor) -> Tensor:
    logits: Tensor = fm.full_output(fm(ids, use_cache=False)).logits
    return logits
