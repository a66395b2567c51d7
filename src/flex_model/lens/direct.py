"""Direct logit attribution: how much does each part of the model write, straight into the residual stream, for one
token and against another?

The last norm is taken at the scale that it had, which makes logits linear in what was added to the stream: parts and
biases sum to the logits. Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flex_model import FlexModel, FlexModelError
from flex_model.errors import ComponentError
from flex_model.lens.logit import Unembedding
from flex_model.lens.whole import whole
from flex_model.result import Result, grid, long_table

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

__all__ = ["DirectLogits", "direct_logit_attribution"]


@dataclass(frozen=True, slots=True)
class DirectLogits(Result):
    """``contribution`` is ``(parts, B)``, in logits; ``bias`` ``(B,)`` is what the last norm and the unembedding add
    of their own. Together they make ``logits`` ``(B,)``, the model's own."""

    contribution: Tensor
    parts: tuple[str, ...]
    bias: Tensor
    logits: Tensor = field(repr=False)

    def to_dataframe(self) -> DataFrame:
        """part, sample, contribution."""
        table = long_table(("part", "sample"), contribution=self.contribution)
        table["part"] = [self.parts[i] for i in table["part"]]
        return table

    def plot(self) -> Figure:
        title = "What each part writes for the answer, in logits"
        figure = grid(self.contribution, title=title, x="sample", y="part")
        figure.update_yaxes(tickvals=list(range(len(self.parts))), ticktext=list(self.parts), autorange="reversed")
        return figure


@torch.no_grad()
def direct_logit_attribution(
    fm: FlexModel, answer: Tensor, *args: Any, against: Tensor | None = None, position: int = -1, **inputs: Any
) -> DirectLogits:
    """Attribute the logit of ``answer``, or its difference from that of ``against``, at one position.

    >>> found = direct_logit_attribution(fm, mary, against=john, input_ids=ids)           # doctest: +SKIP
    >>> found.to_dataframe().sort_values("contribution").tail()                            # doctest: +SKIP

    ``answer`` and ``against`` are token ids, ``(B,)`` of the whole batch or one for all; the other arguments are the
    model's. Parts are the embedding, and every layer's attention and MLP. Collective; every rank gets the result.
    Raises FlexModelError where the model does more with its last residual than a norm and an unembedding.
    """
    unembed = Unembedding(fm)
    places = [fm.at("resid_pre", 0), fm.at("attn_out"), fm.at("mlp_out"), fm.at("resid_post", -1)]
    with fm.capture(*places, select=(slice(None), position)) as acts:
        output = fm.full_output(fm(*args, **inputs))
    logits = (output.logits if hasattr(output, "logits") else output)[:, position].double().cpu()
    keys = [places[0].key, *(k for pair in zip(places[1].keys, places[2].keys, strict=True) for k in pair)]
    values = {key: whole(acts, key).double().cpu() for key in keys}
    flat = next((key for key, value in values.items() if value.dim() != 2), None)
    if flat is not None:
        raise ComponentError(
            f"{flat!r} has no dim of positions to take one from; this model flattens its tokens there, so that its "
            f"parts cannot be told apart by position."
        )
    written = torch.stack(list(values.values()))  # (parts, B, D)
    rows = len(logits)
    told = _rows(answer, rows)
    wanted = logits.gather(1, told[:, None])[:, 0]
    weight, bias = (None if t is None else t.double().cpu() for t in _weights(unembed.head))
    assert weight is not None
    direction = weight[told]
    offset = torch.zeros(rows, dtype=torch.float64) if bias is None else bias[told]
    if against is not None:
        other = _rows(against, rows)
        wanted = wanted - logits.gather(1, other[:, None])[:, 0]
        direction = direction - weight[other]
        offset = offset - (0 if bias is None else bias[other])
    last = whole(acts, places[3].key)
    through, own = _linear(unembed, last, direction)
    contribution = (written * through).sum(-1)
    found = contribution.sum(0) + offset + own
    error = float((found - wanted).abs().max() / logits.abs().max().clamp_min(1e-12))
    if not error <= (1e-3 if unembed.dtype == torch.float32 else 5e-2):
        raise FlexModelError(
            f"the parts do not sum to the model's logits: they are off by {error:.1e} of the largest; the model does "
            f"something more with its last residual than its last norm and its unembedding.",
            page="unembedding-differs",
        )
    names = tuple("embed" if i == 0 else key.removeprefix("@") for i, key in enumerate(keys))
    return DirectLogits(contribution, names, offset + own, wanted)


def _weights(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    if not isinstance(weight, Tensor):
        raise ComponentError(f"the unembedding is a {type(head).__name__} without a weight.")
    return weight, bias


def _rows(tokens: Tensor | int, rows: int) -> Tensor:
    ids = torch.as_tensor(tokens, dtype=torch.long).cpu().flatten()
    if len(ids) not in (1, rows):
        raise FlexModelError(
            f"there are {len(ids)} answers for a batch of {rows}; give one a row, or one for all.", page="bad-argument"
        )
    return ids.expand(rows)


def _linear(unembed: Unembedding, last: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """What of each unit of the residual goes along ``direction`` behind the norm, at the norm's scale, both ``(B, D)``;
    and what its bias adds, ``(B,)``."""
    norm, x = unembed.norm, last.double().cpu()
    if isinstance(norm, nn.LayerNorm):
        weight = torch.ones(x.shape[-1]) if norm.weight is None else norm.weight.cpu()
        scale = (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
        through = direction * weight.double() / scale
        own = direction.new_zeros(len(x)) if norm.bias is None else direction @ norm.bias.double().cpu()
        return through - through.mean(-1, keepdim=True), own
    out = norm(last.to(device=unembed.device, dtype=unembed.dtype)).double().cpu()
    size = torch.where(x.abs() > 1e-30, x, torch.ones_like(x))  # such norms scale each unit, whatever the others are
    return direction * torch.where(x.abs() > 1e-30, out / size, torch.zeros_like(x)), direction.new_zeros(len(x))
