"""``Probe`` and ``ProbeSweep``: what training probes gives."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from flex_model import FlexModelError
from flex_model.lens.probes.fit import Kind, Weights, read_out
from flex_model.result import Result, grid, lines, long_table

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

__all__ = ["Probe", "ProbeSweep", "Tokens"]

Tokens = Literal["last", "mean", "every"]

_TOLD = ("component", "layer", "kind", "tokens", "train_score", "test_score")  # fields that are kept as JSON


@dataclass(frozen=True, slots=True)
class Probe(Result):
    """A trained probe; ``probe(values)`` gives logits.

    ``weight`` (C, D), with queries (Q, C, D), ``bias`` (C,) and ``query`` (Q, D) are for values as they are, in
    float64; C is 1 in a regression. Scores are accuracies, of a regression R^2; ``labels`` and ``predicted`` (N,) are
    of the test rows, of the training rows where there are none.
    """

    component: str
    layer: int | None
    kind: Kind
    tokens: Tokens
    train_score: float
    test_score: float | None
    weight: Tensor = field(repr=False)
    bias: Tensor = field(repr=False)
    query: Tensor | None = field(repr=False)
    labels: Tensor = field(repr=False)
    predicted: Tensor = field(repr=False)

    def __call__(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (..., C) of values (..., D), differentiably; of a regression what it predicts, (...).

        An attention probe reads sequences (N, S, D), and gives (N, C); ``mask`` (N, S) says what is no padding. Heads
        may be flattened or not.
        """
        width = self.weight.shape[-1]
        if values.dim() > 1 and values.shape[-2] * values.shape[-1] == width != values.shape[-1]:
            values = values.flatten(-2)
        if values.shape[-1] != width or (self.query is not None and values.dim() != 3):
            expected = f"(..., {width})" if self.query is None else f"(N, S, {width})"
            raise FlexModelError(f"this probe reads values {expected}, got {tuple(values.shape)}.", page="bad-argument")
        there = Weights(*(None if t is None else t.to(values.device) for t in self._weights))  # type: ignore[arg-type]
        seen = None if mask is None else mask.to(values.device).bool()
        logits = read_out(values.double(), there, seen)
        return logits.squeeze(-1) if self.regression else logits

    @property
    def _weights(self) -> Weights:
        return Weights(self.weight, self.bias, self.query)

    @property
    def regression(self) -> bool:
        return self.labels.is_floating_point()

    @property
    def score(self) -> float:
        """Of the test rows; of the training rows where there are none."""
        return self.train_score if self.test_score is None else self.test_score

    @property
    def accuracy(self) -> float:
        """``score`` of a classifier."""
        if self.regression:
            raise FlexModelError("a regression has no accuracy; take probe.score, its R^2.", page="bad-argument")
        return self.score

    @property
    def direction(self) -> Tensor:
        """(D,), in units of values: where the logit of class 1 over class 0 grows fastest, or what is predicted; of an
        attention probe, if all tokens move alike."""
        if len(self.bias) > 2:
            raise FlexModelError(
                f"a probe of {len(self.bias)} classes has no one direction; take the difference of two rows of "
                f"probe.weight.",
                page="bad-argument",
            )
        weight = self.weight if self.query is None else self.weight.sum(0)
        return (weight[-1] if self.regression else weight[1] - weight[0]).float()

    def to_dataframe(self) -> DataFrame:
        """row, label, predicted."""
        return long_table(("row",), label=self.labels, predicted=self.predicted)

    def plot(self) -> Figure:
        """Which classes are taken for which, as shares of each; of a regression, what is predicted by label."""
        where = f"{self.component!r}" + ("" if self.layer is None else f" of layer {self.layer}")
        if self.regression:
            title = f"Probe on {where}: R^2 {self.score:.3f}"
            return lines({"rows": (self.labels, self.predicted)}, title=title, x="label", y="predicted", points=True)
        classes = len(self.bias)
        counts = torch.bincount(self.labels * classes + self.predicted, minlength=classes**2).view(classes, classes)
        shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
        text = [[str(n) for n in row] for row in counts.tolist()]
        title = f"Probe on {where}: accuracy {self.accuracy:.3f}"
        return grid(shares, title=title, x="predicted", y="label", text=text, centred=False)

    def save(self, path: str | Path) -> Path:
        """One safetensors file: tensors, and the rest as JSON in its header. Every rank may write the same path."""
        from safetensors.torch import save_file

        path = Path(path)
        tensors = {name: getattr(self, name) for name in ("weight", "bias", "query", "labels", "predicted")}
        told = json.dumps({"version": 1, **{name: getattr(self, name) for name in _TOLD}})
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        save_file(
            {k: v.contiguous() for k, v in tensors.items() if v is not None}, part, metadata={"flex_model.probe": told}
        )
        os.replace(part, path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Probe:
        """What ``save`` wrote. Nothing in the file is run."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            told = (file.metadata() or {}).get("flex_model.probe")
            if told is None:
                raise FlexModelError(f"{str(path)!r} holds no probe; probe.save writes one.", page="bad-argument")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        known = json.loads(told)
        return cls(**{name: known[name] for name in _TOLD}, **{"query": None, **tensors})


@dataclass(frozen=True, slots=True)
class ProbeSweep(Result):
    """One probe a layer, in the order of the layers; ``sweep[6]`` is that of layer 6."""

    probes: tuple[Probe, ...]

    def __getitem__(self, layer: int) -> Probe:
        found = [p for p in self.probes if p.layer == layer]
        if not found:
            raise FlexModelError(
                f"there is no probe of layer {layer!r}; there are of {', '.join(map(str, self.layers))}.",
                page="bad-argument",
            )
        return found[0]

    def __iter__(self) -> Iterator[Probe]:
        return iter(self.probes)

    def __len__(self) -> int:
        return len(self.probes)

    @property
    def layers(self) -> tuple[int | None, ...]:
        return tuple(p.layer for p in self.probes)

    @property
    def accuracy(self) -> Tensor:
        """(layers,)"""
        return torch.tensor([p.accuracy for p in self.probes], dtype=torch.float64)

    @property
    def best(self) -> Probe:
        """The probe with the highest score, the first of several."""
        return max(self.probes, key=lambda p: p.score)

    def to_dataframe(self) -> DataFrame:
        """layer, train, and test where there are test rows."""
        scores = self._scores()
        table = long_table(("layer",), **scores)
        table["layer"] = list(self.layers)
        return table

    def plot(self) -> Figure:
        """Scores by layer, and of a classifier the share of the commonest class."""
        first = self.probes[0]
        x = torch.tensor([-1 if i is None else i for i in self.layers])
        curves = {name: (x, y) for name, y in self._scores().items()}
        if not first.regression:
            common = first.labels.bincount().max() / len(first.labels)
            curves["commonest class"] = (x, common.expand(len(x)))
        what = "R^2" if first.regression else "accuracy"
        title = f"Probes on {first.component!r}: {what} by layer"
        return lines(curves, title=title, x="layer", y=what)

    def _scores(self) -> dict[str, Tensor]:
        train = {"train": torch.tensor([p.train_score for p in self.probes], dtype=torch.float64)}
        tests = [p.test_score for p in self.probes if p.test_score is not None]
        return {**train, "test": torch.tensor(tests, dtype=torch.float64)} if tests else train
