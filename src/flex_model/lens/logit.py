"""The logit lens: what would the model predict if it ended after each layer?

The residual stream after every layer goes through the model's own last norm and unembedding. After nostalgebraist,
"interpreting GPT: the logit lens" (2020).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flex_model import FlexModel, FlexModelError
from flex_model.lens.whole import whole
from flex_model.result import Result, grid, long_table

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

__all__ = ["LogitLens", "Unembedding", "logit_lens"]

_AGREES = 1e-3  # of the largest logit: how well the last layer's must be the model's own


@dataclass(frozen=True, slots=True)
class LogitLens(Result):
    """``(layers, B, S)`` each: the most probable next token, its probability, and the divergence of the model's own
    prediction from the layer's, KL(model | layer) in nats. The last layer's is the model's own."""

    top: Tensor
    probability: Tensor
    divergence: Tensor
    tokens: Tensor = field(repr=False)  # (B, S), what was read

    def to_dataframe(self) -> DataFrame:
        """layer, sample, position, top, probability, divergence."""
        names = ("layer", "sample", "position")
        return long_table(names, top=self.top, probability=self.probability, divergence=self.divergence)

    def plot(self, sample: int = 0, *, decode: Callable[[int], str] = str) -> Figure:
        """Layers by positions of one sample: the divergence as colour, the most probable token as text.

        ``decode`` makes text of a token id, such as ``tokenizer.decode``.
        """
        labels = [decode(int(t)) for t in self.tokens[sample]]
        text = [[decode(int(t)) for t in row] for row in self.top[:, sample]]
        title = "Divergence of the model's prediction from each layer's (nats)"
        values = self.divergence[:, sample]
        return grid(values, title=title, x="position", y="layer", labels=labels, text=text, centred=False)


class Unembedding:
    """From the residual stream to logits, by plain copies of the model's own last modules, on every rank.

    Of a model whose logits are more than that (Gemma 2 caps them), ``check`` says so.
    """

    def __init__(self, fm: FlexModel) -> None:
        names = [fm.at(part).spots[0].name for part in ("ln_final", "unembed")]
        self.norm, self.head = (fm.whole_module(name) for name in names)
        place = next(self.head.parameters())
        self.device, self.dtype = place.device, place.dtype

    def __call__(self, residual: Tensor) -> Tensor:
        """Logits of ``(..., D)``, in float32."""
        logits: Tensor = self.head(self.norm(residual.to(device=self.device, dtype=self.dtype)))
        return logits.float()

    def check(self, residual: Tensor, logits: Tensor) -> None:
        """Raise FlexModelError unless these are the model's logits of its last residual."""
        mine, theirs = self(residual).cpu(), logits.float().cpu()
        error = float((mine - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))
        if not error <= (_AGREES if self.dtype == torch.float32 else 50 * _AGREES):
            raise FlexModelError(
                f"the model's logits are not its unembedding of the last norm of its last residual: they differ by "
                f"{error:.1e} of the largest; the model does something more with them.",
                page="unembedding-differs",
            )


def logit_lens(fm: FlexModel, *args: Any, layers: Sequence[int] | None = None, **inputs: Any) -> LogitLens:
    """The logit lens of one batch; the arguments are the model's.

    >>> lens = logit_lens(fm, input_ids=ids)          # doctest: +SKIP
    >>> lens.plot(decode=tokenizer.decode).show()     # doctest: +SKIP

    Collective; every rank gets all of it. ``layers`` leaves some out; the last is always there. Raises ComponentError
    on models whose layers, last norm or unembedding are not found.
    """
    return read_layers(fm, args, inputs, layers, lambda layer, residual: residual)


@torch.no_grad()
def read_layers(
    fm: FlexModel,
    args: Sequence[Any],
    inputs: Mapping[str, Any],
    layers: Sequence[int] | None,
    translate: Callable[[int, Tensor], Tensor],
) -> LogitLens:
    """The lens that unembeds ``translate(layer, residual)``; the last layer's residual is taken as it is."""
    every = fm.at("resid_post")
    chosen = every if layers is None else fm.at("resid_post", [*layers, -1])
    numbers = [every.keys.index(key) for key in chosen.keys]
    unembed = Unembedding(fm)
    with fm.capture(chosen) as acts:
        output = fm.full_output(fm(*args, **inputs))
    logits = output.logits if hasattr(output, "logits") else output
    residuals = [whole(acts, key) for key in chosen.keys]
    unembed.check(residuals[-1], logits)
    final = logits.float().to(unembed.device).log_softmax(-1)
    last = len(every.keys) - 1
    found = []
    for layer, residual in zip(numbers, residuals, strict=True):
        residual = residual.to(unembed.device)
        logs = unembed(residual if layer == last else translate(layer, residual)).log_softmax(-1)
        found.append(_of_layer(logs, final))
    given = inputs.get("input_ids", args[0] if args else None)
    tokens = fm.full_batch(given).cpu() if isinstance(given, Tensor) else torch.zeros(final.shape[:2], dtype=torch.long)
    top, probability, divergence = (torch.stack(x).cpu() for x in zip(*found, strict=True))
    return LogitLens(top, probability, divergence, tokens)


def _of_layer(logs: Tensor, final: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    best, top = logs.max(-1)
    return top, best.exp(), divergence(final, logs).clamp_min(0)


def divergence(model: Tensor, layer: Tensor) -> Tensor:
    """KL(model | layer) of log probabilities over the last dim, in nats."""
    return nn.functional.kl_div(layer, model, log_target=True, reduction="none").sum(-1)
