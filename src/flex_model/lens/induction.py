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
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flex_model import FlexModel, FlexModelError, edits

if TYPE_CHECKING:
    from rich.table import Table

    from flex_model.core.hook_function import RunMode

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

# What decoders call their attention modules, and inside them the projection that mixes the heads.
_ATTENTION = ("self_attn", "attn", "self_attention", "attention")
_PROJECTION = ("o_proj", "out_proj", "c_proj", "dense")


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
class Induction:
    """What ``measure`` found.

    ``scores`` (layers, heads) and ``logits`` (B, S, vocabulary) are the unedited model's; ``loss_without`` is
    the loss without the ``removed`` heads.
    """

    scores: Tensor
    loss: CopyLoss
    removed: tuple[Head, ...]
    loss_without: CopyLoss
    logits: Tensor = field(repr=False)

    def difference(self, other: Induction) -> dict[str, float]:
        """The largest absolute difference from another run of the same measurement, by kind of result."""
        mine, theirs = ([*asdict(x.loss).values(), *asdict(x.loss_without).values()] for x in (self, other))
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

    def heatmap(self, path: str | Path) -> Path:
        """A picture of all scores, the removed heads outlined."""
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
        from matplotlib.ticker import MaxNLocator

        layers, heads = self.scores.shape
        size = max(8.0, 1.6 + 0.3 * layers), max(2.5, 1.1 + 0.3 * heads)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(self.scores.T, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for layer, head in self.removed:
            corner = layer - 0.5, head - 0.5
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#d1495b", lw=1.5, clip_on=False))
        axes.set(xlabel="layer", ylabel="head")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.set_title("Attention to the token after the previous occurrence (outlined: removed)", loc="left")
        axes.spines[:].set_visible(False)
        figure.colorbar(image, ax=axes, label="mean attention", pad=0.02)
        figure.savefig(Path(path), dpi=160)
        return Path(path)

    def save_json(self, path: str | Path) -> Path:
        """Everything but the logits."""
        content: dict[str, Any] = {
            "loss": asdict(self.loss),
            "removed": [head._asdict() for head in self.removed],
            "loss_without": asdict(self.loss_without),
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
def remove_heads(fm: FlexModel, heads: Iterable[tuple[int, int]], *, run: RunMode = "every_rank") -> Iterator[None]:
    """Zero the outputs of (layer, head) pairs while the block runs, where the output projection takes them.

    >>> with remove_heads(fm, [(18, 6), (17, 3)]):   # doctest: +SKIP
    ...     fm(ids)
    """
    projections = [projection for _, projection in _attention_sites(fm)]
    count = int(fm.config.get_text_config().num_attention_heads)
    by_layer: dict[int, list[int]] = defaultdict(list)
    for layer, head in heads:
        if not (0 <= layer < len(projections) and 0 <= head < count):
            raise FlexModelError(
                f"there is no head ({layer}, {head}); there are {len(projections)} layers of {count} heads.",
                page="head-unknown",
            )
        by_layer[layer].append(head)
    with ExitStack() as stack:
        for layer, inside in by_layer.items():
            edit = _without(inside, count)
            stack.enter_context(fm.edit(projections[layer], edit, hook_type="forward_pre", run=run))
        yield


def measure(
    fm: FlexModel, ids: Tensor, *, top: int = 5, progress: Callable[[str], object] = lambda step: None
) -> Induction:
    """Score every head on repeated tokens, then remove the ``top`` best and see what that does to the loss.

    ``progress`` is told each step before it starts. Collective; the result is whole on every rank.
    """
    progress("attention of every layer")
    scores, logits = _observe(fm, ids)
    whole = fm.full_batch(ids)
    heads = tuple(head for head, _ in top_heads(scores, top))
    progress(f"loss without the top {len(heads)} heads")
    with remove_heads(fm, heads):
        loss_without = repeated_loss(_logits(fm, ids), whole)
    return Induction(scores, repeated_loss(logits, whole), heads, loss_without, logits.cpu())


def _observe(fm: FlexModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and logits of one forward."""
    names = [attention for attention, _ in _attention_sites(fm)]
    with fm.capture(names, unpack_idx=1) as acts:
        logits = _logits(fm, ids)
    if not acts and not acts.refused:
        raise FlexModelError(
            f"{names[0]!r} returns no attention probabilities; load it with attn_implementation='eager'.",
            page="attention-unknown",
        )
    back = 1 - ids.shape[1] // 2
    scores = [acts[name].float().diagonal(back, -2, -1).mean((0, 2)) for name in names]  # type: ignore[union-attr]
    return torch.stack(scores), logits


@torch.no_grad()
def _logits(fm: FlexModel, ids: Tensor) -> Tensor:
    logits: Tensor = fm.full_output(fm(ids, use_cache=False)).logits
    return logits


def _attention_sites(fm: FlexModel) -> list[tuple[str, str]]:
    """(attention module, its output projection) of every layer, in the model's order."""
    names = set(fm.wrapped_module_names)
    sites = [
        (name, projection)
        for name in fm.wrapped_module_names
        if name.rpartition(".")[2] in _ATTENTION
        for projection in (f"{name}.{p}" for p in _PROJECTION)
        if projection in names
    ]
    if not sites:
        raise FlexModelError(
            f"no attention found; expected modules called {', '.join(_ATTENTION)} "
            f"that hold one of {', '.join(_PROJECTION)}.",
            page="attention-unknown",
        )
    return sites


def _without(heads: list[int], count: int) -> Callable[[Tensor], Tensor]:
    zero = edits.zero(heads, dim=-2)

    def edit(x: Tensor) -> Tensor:  # (B, S, heads * head_dim)
        out: Tensor = zero(x.reshape(*x.shape[:-1], count, -1)).flatten(-2)
        return out

    return edit
