"""Probes: what can be read off a frozen model's values, by a small classifier or regression trained on them.

Alain and Bengio, "Understanding intermediate layers using linear classifier probes" (2016). Attention probes: McKenzie
et al., "Detecting High-Stakes Interactions with Activation Probes" (2025), and with several queries Shabalin and
Belrose, "Attention Probes" (EleutherAI, 2025), here without their bias of positions.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import get_args

import torch

from flex_model import FlexModel, FlexModelError
from flex_model.components.finder import Layers
from flex_model.components.place import Place
from flex_model.lens.probes.fit import Kind, Optimizing, Recipe, fit, score
from flex_model.lens.probes.result import Probe, ProbeSweep, Tokens
from flex_model.lens.probes.rows import Batches, Rows, collect
from flex_model.progress import progress_bar

__all__ = ["Probe", "ProbeSweep", "train_probe", "train_probes"]


def train_probe(
    fm: FlexModel,
    batches: Batches,
    *,
    layer: int | None = None,
    component: str = "resid_post",
    head: int | Sequence[int] | None = None,
    kind: Kind = "linear",
    tokens: Tokens = "last",
    queries: int = 1,
    test: Batches | None = None,
    weight_decay: float = 0.01,
    optimizer: Optimizing | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool | None = None,
) -> Probe:
    """Train a probe on one component of a frozen model, which is only run; call ``fm.eval()`` first.

    >>> probe = train_probe(fm, [(inputs, labels)], layer=6, test=[(others, theirs)])          # doctest: +SKIP
    >>> probe.accuracy, probe.plot(), probe(acts[fm.at("resid_post", 6)][:, -1])               # doctest: +SKIP
    >>> with fm.edit(fm.at("resid_post", 6), edits.add(probe.direction, scale=4.0)):           # doctest: +SKIP
    ...     fm.generate(**prompt)

    ``batches``: pairs of token ids, or the model's keywords, and labels, of this rank's rows under data parallel
    engines. Integer labels from 0 are classes (cross entropy; -100: left out), floats are regressed on (squared error,
    R^2). ``component``, ``layer`` and ``head`` as in ``fm.at``; several heads lie side by side. ``kind="linear"`` reads
    the last token that is no padding, the mean over tokens, or every token, with labels (B, S). ``kind="attention"``
    reads whole sequences: ``queries`` learned vectors each attend over the tokens, and what they see is read out
    linearly.

    Weights are trained for standardised values, with ``weight_decay / 2 * sum(w^2)`` beside the loss. Left out, the
    optimizer is LBFGS on all rows with up to 100 iterations for linear probes, whose loss is convex: there is no
    learning rate to find, and the end does not hang on the way there. Attention probes take AdamW at 0.01, 32 rows a
    step, for 30 epochs; so does a linear probe with a ``batch_size``, for 100. ``optimizer`` makes another from
    parameters, such as ``lambda p: torch.optim.SGD(p, 0.1)``. ``seed`` is that of the queries and of the order of rows.

    One forward a batch; what is read is then kept in host memory in float32: rows x D numbers, or with every token or
    attention tokens x D. Collective; every rank trains the same probe on ``device``, in float64, and gets it. Raises
    FlexModelError where labels and rows do not fit, or are all alike.
    """
    place = fm.at(component, layer, head=head)
    if len(place.spots) > 1:
        raise FlexModelError(
            f"{component!r} is in {len(place.spots)} layers; name one with layer=, or take train_probes for all.",
            page="bad-argument",
        )
    recipe = Recipe(kind, queries, weight_decay, optimizer, epochs, batch_size, seed, device)
    return _train(fm, batches, place, tokens, test, recipe, progress)[0]


def train_probes(
    fm: FlexModel,
    batches: Batches,
    *,
    layers: Layers = None,
    component: str = "resid_post",
    head: int | Sequence[int] | None = None,
    kind: Kind = "linear",
    tokens: Tokens = "last",
    queries: int = 1,
    test: Batches | None = None,
    weight_decay: float = 0.01,
    optimizer: Optimizing | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool | None = None,
) -> ProbeSweep:
    """``train_probe`` on several layers, or all of them, with one forward a batch for all.

    >>> sweep = train_probes(fm, batches, test=held_out)                                       # doctest: +SKIP
    >>> sweep.plot(), sweep.best.layer, sweep[6].direction                                     # doctest: +SKIP

    Host memory holds what is read of all of these layers.
    """
    place = fm.at(component, layers, head=head)
    recipe = Recipe(kind, queries, weight_decay, optimizer, epochs, batch_size, seed, device)
    return ProbeSweep(tuple(_train(fm, batches, place, tokens, test, recipe, progress)))


def _train(
    fm: FlexModel,
    batches: Batches,
    place: Place,
    tokens: Tokens,
    test: Batches | None,
    recipe: Recipe,
    progress: bool | None,
) -> list[Probe]:
    _check_asked(place, tokens, recipe)
    read = "all" if recipe.kind == "attention" else tokens
    known = sum(len(b) if isinstance(b, Sized) else 0 for b in (batches, test))
    with progress_bar(known + len(place.keys), "probes", progress) as step:
        rows = collect(fm, batches, place, read, step)
        held = None if test is None else collect(fm, test, place, read, step)
        _check_labels(rows, held)
        found = []
        for key in place.keys:
            found.append(_of_key(key, place.component, tokens, rows, held, recipe))
            step()
    return found


def _of_key(key: str, component: str, tokens: Tokens, rows: Rows, held: Rows | None, recipe: Recipe) -> Probe:
    values = rows.values.pop(key)
    weights = fit(values, rows.labels, rows.mask, recipe)
    train, predicted = score(weights, values, rows.labels, rows.mask)
    test, labels = None, rows.labels
    if held is not None:
        test, predicted = score(weights, held.values.pop(key), held.labels, held.mask)
        labels = held.labels
    number = key.split(".")[1:2]
    layer = int(number[0]) if number else None
    return Probe(component, layer, recipe.kind, tokens, train, test, *weights, labels, predicted)


def _check_asked(place: Place, tokens: Tokens, recipe: Recipe) -> None:
    for name, given, known in (("kind", recipe.kind, get_args(Kind)), ("tokens", tokens, get_args(Tokens))):
        if given not in known:
            raise FlexModelError(
                f"{name}={given!r} is unknown; expected {', '.join(map(repr, known[:-1]))} or {known[-1]!r}.",
                page="bad-argument",
            )
    if place.component == "pattern":
        raise FlexModelError("a probe reads values of tokens; 'pattern' has none, take 'z'.", page="bad-argument")
    numbers = ("queries", recipe.queries, 1), ("epochs", recipe.epochs, 1), ("batch_size", recipe.batch_size, 1)
    for what, number, least in (*numbers, ("weight_decay", recipe.weight_decay, 0)):
        if number is not None and not number >= least:
            raise FlexModelError(f"{what}={number!r}; expected at least {least}.", page="bad-argument")


def _check_labels(rows: Rows, held: Rows | None) -> None:
    labels = rows.labels
    if not len(labels) or (held is not None and not len(held.labels)):
        raise FlexModelError("no row has a label; all of them are -100 or padding.", page="bad-argument")
    if bool((labels == labels[0]).all()):
        raise FlexModelError(
            f"all {len(labels)} labels are {labels[0].item()!r}; a probe needs two kinds.", page="bad-argument"
        )
    if held is not None and held.regression != rows.regression:
        raise FlexModelError(
            f"labels are {labels.dtype} for training and {held.labels.dtype} in the test; give the same kind.",
            page="bad-argument",
        )
    if not rows.regression:
        classes = int(labels.max()) + 1
        every = labels if held is None else torch.cat([labels, held.labels])
        wrong = every[(every < 0) | (every >= classes)]
        if len(wrong):
            raise FlexModelError(
                f"the label {int(wrong[0])} is no class of the training rows; they have 0 to {classes - 1}.",
                page="bad-argument",
            )
