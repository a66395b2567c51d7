"""Fitting probes to rows: plain torch in float64, the same on one process and on every rank of many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import LBFGS, AdamW, Optimizer

from flex_model import FlexModelError

__all__ = ["Kind", "Optimizing", "Recipe", "Weights", "fit", "read_out", "score"]

Kind = Literal["linear", "attention"]
Optimizing = Callable[[Iterable[nn.Parameter]], Optimizer]

_CHUNK = 2**24  # elements that are worked on at once, in float64


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train; None: what suits the kind."""

    kind: Kind = "linear"
    queries: int = 1
    weight_decay: float = 0.01
    optimizer: Optimizing | None = None
    epochs: int | None = None
    batch_size: int | None = None
    seed: int = 0
    device: str | torch.device = "cpu"


class Weights(NamedTuple):
    """``weight`` (C, D) and ``bias`` (C,) of a linear probe; with ``query`` (Q, D), ``weight`` is (Q, C, D)."""

    weight: Tensor
    bias: Tensor
    query: Tensor | None


def read_out(values: Tensor, weights: Weights, mask: Tensor | None = None) -> Tensor:
    """Logits ``(..., C)`` of values ``(..., D)``; with queries ``(N, C)`` of sequences ``(N, S, D)``."""
    weight, bias, query = weights
    if query is None:
        return values @ weight.mT + bias
    scores = values @ query.mT  # (N, S, Q)
    if mask is not None:
        scores = scores.masked_fill(~mask[..., None], -torch.inf)
    seen = torch.einsum("nsq,nsd->nqd", scores.softmax(1), values)
    return torch.einsum("nqd,qcd->nc", seen, weight) + bias


def fit(values: Tensor, labels: Tensor, mask: Tensor | None, recipe: Recipe) -> Weights:
    """The weights, for values as they are; floats are regressed on, integers classified.

    The penalty is of weights for standardised values, ``weight_decay / 2 * sum(w^2)`` beside the mean loss.
    """
    regression = labels.is_floating_point()
    classes = 1 if regression else int(labels.max()) + 1
    centre, spread = (labels.double().mean(), labels.double().std(correction=0)) if regression else (0.0, 1.0)
    wanted = (labels.double() - centre) / spread if regression else labels
    rows = _Data(values, wanted, mask, recipe)
    free, fold = _standardised(rows, classes, recipe)
    with torch.enable_grad():
        _descend(rows, free, fold, recipe)
    weight, bias, query = (None if t is None else t.detach().cpu() for t in fold(free))
    assert weight is not None and bias is not None
    if not bool(weight.isfinite().all()):
        raise FlexModelError(
            "training a probe diverged: its weights are not finite; take a smaller learning rate.", page="bad-argument"
        )
    return Weights(weight * spread, bias * spread + centre, query)


def score(weights: Weights, values: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[float, Tensor]:
    """Accuracy, or R^2 of a regression; and the prediction of every row."""
    parts = [read_out(x, weights, m) for x, _, m in _Data(values, labels, mask, Recipe()).chunks(slice(None))]
    logits = torch.cat(parts)
    if not labels.is_floating_point():
        predicted = logits.argmax(-1)
        return float((predicted == labels).double().mean()), predicted
    predicted, wanted = logits[:, 0], labels.double()
    share = (predicted - wanted).pow(2).sum() / (wanted - wanted.mean()).pow(2).sum()
    return float(1 - share), predicted.float()


class _Data:
    """Rows by chunks, in float64 and on the device where the work is."""

    def __init__(self, values: Tensor, labels: Tensor, mask: Tensor | None, recipe: Recipe) -> None:
        self.device = torch.device(recipe.device)
        few = values.numel() <= _CHUNK
        self.values = values.to(self.device, torch.float64) if few else values
        self.labels = labels.to(self.device)
        self.mask = None if mask is None else mask.to(self.device)
        self.size = max(1, _CHUNK // max(1, values[0].numel()))

    def __len__(self) -> int:
        return len(self.labels)

    def chunks(self, rows: Tensor | slice) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        every = rows if isinstance(rows, Tensor) else torch.arange(len(self))
        for some in every.split(self.size):
            there = some.to(self.device)
            values = self.values if len(some) == len(self) and isinstance(rows, slice) else self._of(some)
            yield (
                values.to(self.device, torch.float64),
                self.labels[there],
                None if self.mask is None else self.mask[there],
            )

    def mean(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        """(D,), over all tokens that are no padding."""
        flat = (values if mask is None else values[mask] for values, _, mask in self.chunks(slice(None)))
        sums = [(of(x).sum(0), len(x)) for x in flat]
        return torch.stack([s for s, _ in sums]).sum(0) / sum(n for _, n in sums)

    def _of(self, rows: Tensor) -> Tensor:
        return self.values[rows.to(self.values.device)]


def _standardised(rows: _Data, classes: int, recipe: Recipe) -> tuple[Weights, Callable[[Weights], Weights]]:
    """Weights to train for standardised values, at their start, and what makes weights for plain values of them.

    Units that do not vary get no weight: what they have is rounding.
    """
    mean = rows.mean(lambda x: x)
    variance = rows.mean(lambda x: (x - mean).pow(2))
    alive = variance > 1e-12 * (variance + mean * mean)
    scale = torch.where(alive, variance, 1).rsqrt() * alive
    device, width = rows.device, len(mean)
    shape, query = (classes, width), None
    if recipe.kind == "attention":
        shape = (recipe.queries, classes, width)  # type: ignore[assignment]
        drawn = torch.randn(recipe.queries, width, dtype=torch.float64, generator=_generator(recipe))
        query = nn.Parameter(drawn.to(device) / width**0.5)  # scores of about 1
    start = {"dtype": torch.float64, "device": device}
    free = Weights(nn.Parameter(torch.zeros(shape, **start)), nn.Parameter(torch.zeros(classes, **start)), query)  # type: ignore[call-overload]

    def fold(given: Weights) -> Weights:
        weight = given.weight * scale
        moved = weight @ mean  # (C,), or (Q, C): a softmax sums to 1 whatever the query
        bias = given.bias - (moved if given.query is None else moved.sum(0))
        return Weights(weight, bias, None if given.query is None else given.query * scale)

    return free, fold


def _descend(rows: _Data, free: Weights, fold: Callable[[Weights], Weights], recipe: Recipe) -> None:
    parameters = [t for t in free if isinstance(t, nn.Parameter)]
    linear = recipe.kind == "linear"
    epochs = (100 if linear else 30) if recipe.epochs is None else recipe.epochs
    size = (len(rows) if linear else 32) if recipe.batch_size is None else recipe.batch_size
    if recipe.optimizer is not None:
        optimizer = recipe.optimizer(parameters)
    elif linear and recipe.batch_size is None:
        optimizer = LBFGS(
            parameters, max_iter=epochs, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )
        epochs = 1
    else:
        optimizer = AdamW(parameters, lr=0.01, weight_decay=0)
    generator = _generator(recipe)
    for _ in range(epochs):
        for some in _steps(len(rows), size, generator):
            optimizer.step(partial(_loss, rows, some, free, fold, recipe, optimizer))  # type: ignore[arg-type]


def _loss(
    rows: _Data,
    some: Tensor | slice,
    free: Weights,
    fold: Callable[[Weights], Weights],
    recipe: Recipe,
    optimizer: Optimizer,
) -> Tensor:
    """The loss of some rows, with its gradient: added up chunk by chunk."""
    optimizer.zero_grad()
    count = len(rows) if isinstance(some, slice) else len(some)
    penalised = [t for t in (free.weight, free.query) if t is not None]
    loss = recipe.weight_decay / 2 * torch.stack([t.pow(2).sum() for t in penalised]).sum()
    loss.backward()
    total = loss.detach()
    for values, labels, mask in rows.chunks(some):
        logits = read_out(values, fold(free), mask)
        if labels.is_floating_point():
            part = (logits[:, 0] - labels).pow(2).sum() / count
        else:
            part = cross_entropy(logits, labels, reduction="sum") / count
        part.backward()
        total = total + part.detach()
    return total


def _steps(rows: int, size: int, generator: torch.Generator) -> Iterator[Tensor | slice]:
    """The rows of each step of an epoch, shuffled unless it is one step."""
    if size >= rows:
        yield slice(None)
    else:
        yield from torch.randperm(rows, generator=generator).split(size)


def _generator(recipe: Recipe) -> torch.Generator:
    return torch.Generator().manual_seed(recipe.seed)
