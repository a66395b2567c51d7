"""Attention patterns in numbers: what does each head look at, on these tokens?

The probabilities are reduced on the ranks that have them, so that one number a row, head and measure moves. Heads of
these kinds: Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021), Olsson et al., "In-context
Learning and Induction Heads" (2022); the first token as a sink: Xiao et al., "Efficient Streaming Language Models with
Attention Sinks" (2023).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from flex_model import FlexModel, FlexModelError
from flex_model.lens.whole import whole
from flex_model.result import Result, grid, long_table

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

__all__ = ["AttentionPatterns", "attention_patterns", "per_head"]

Measure = Literal["previous", "current", "first", "duplicate", "induction", "entropy", "distance"]


@dataclass(frozen=True, slots=True)
class AttentionPatterns(Result):
    """``(layers, heads)`` each, means over the queries that can have it, of all rows; NaN where none can.

    The probability on the ``previous`` token, the ``current`` and the ``first`` (a sink); on all earlier tokens that
    are the same (``duplicate``); on all that followed those (``induction``, the current one left out). ``entropy`` of
    the probabilities, in nats; ``distance`` in tokens, weighted by probability.
    """

    previous: Tensor
    current: Tensor
    first: Tensor
    duplicate: Tensor
    induction: Tensor
    entropy: Tensor
    distance: Tensor

    def to_dataframe(self) -> DataFrame:
        """layer, head, and a column a measure."""
        return long_table(("layer", "head"), **{f.name: getattr(self, f.name) for f in fields(self)})

    def plot(self, measure: Measure = "induction") -> Figure:
        if measure not in get_args(Measure):
            raise FlexModelError(
                f"measure={measure!r} is unknown; expected one of {', '.join(get_args(Measure))}.", page="bad-argument"
            )
        unit = {"entropy": "nats", "distance": "tokens"}.get(measure, "mean attention")
        title = f"Attention patterns: {measure} ({unit})"
        return grid(getattr(self, measure), title=title, x="head", y="layer", centred=False)


@torch.no_grad()
def attention_patterns(fm: FlexModel, *args: Any, **inputs: Any) -> AttentionPatterns:
    """Measure what every head attends to on one batch; the arguments are the model's, token ids among them.

    >>> found = attention_patterns(fm, input_ids=ids, attention_mask=mask)                  # doctest: +SKIP
    >>> found.to_dataframe().nlargest(5, "previous"), found.plot("entropy")                 # doctest: +SKIP

    Padding by ``attention_mask`` (B, S) counts neither as query nor as key, on either side. Collective; every rank gets
    the result. Raises ComponentError where attention computes no probabilities (transformers: load the model with
    ``attn_implementation="eager"``).
    """
    place = fm.at("pattern")
    mine = _tokens(args, inputs)
    rows, every = _Rows(*mine), _Rows(*fm.full_batch(mine))
    reduce = per_head(lambda p: (rows if (len(p), p.shape[-1]) == rows.tokens.shape else every).sums(p))
    with fm.capture(place, select=reduce) as acts:
        fm(*args, **inputs)
    sums = torch.stack([whole(acts, key).sum(0) for key in place.keys])  # (layers, heads, measures)
    means = sums / every.queries().to(sums)
    return AttentionPatterns(*means.float().cpu().unbind(-1))


def per_head(reduce: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A ``select`` of patterns that runs on the shards: ``reduce`` makes (B, heads, ...) of (B, heads, S, S), each row
    and head by itself."""

    def select(pattern: Tensor) -> Tensor:
        if pattern.is_floating_point():
            return reduce(pattern)
        return pattern[..., 0, 0]  # coordinates, by which select= learns that rows and heads come out as they went in

    return select


class _Rows:
    """Tokens (B, S) and which are no padding: some rows of a batch, or all."""

    def __init__(self, tokens: Tensor, real: Tensor) -> None:
        self.tokens, self.real = tokens, real.bool()

    def pairs(self) -> list[Tensor]:
        """(B, S, S), query by key: which pairs each of the first five measures is about."""
        length = self.tokens.shape[1]
        same = (self.tokens[:, :, None] == self.tokens[:, None, :]).tril(-1) & self.real[:, None, :]
        followed = torch.zeros_like(same)
        followed[:, :, 1:] = same[:, :, :-1]
        eye = torch.eye(length, dtype=torch.bool, device=same.device)
        before = torch.zeros_like(eye)
        before[1:, :-1] = eye[:-1, :-1]
        first = self.real & (self.real.cumsum(1) == 1)
        found = [before[None], eye[None], first[:, None, :], same, followed.tril(-1)]
        return [f & self.real[:, :, None] & self.real[:, None, :] for f in found]

    def queries(self) -> Tensor:
        """How many queries of all rows each measure is about: ``(7,)``."""
        counts = [pairs.any(-1).sum() for pairs in self.pairs()]
        return torch.stack([*counts, self.real.sum(), self.real.sum()])

    def sums(self, pattern: Tensor) -> Tensor:
        """(B, heads, 7): each measure of these rows' patterns (B, heads, S, S), summed over the queries."""
        p = pattern.float() if pattern.dtype != torch.float64 else pattern
        here = _Rows(self.tokens.to(p.device), self.real.to(p.device))
        found = [torch.einsum("bhqk,bqk->bh", p, pairs.to(p)) for pairs in here.pairs()]
        places = torch.arange(p.shape[-1], device=p.device)
        distance = (places[:, None] - places).abs().to(p)
        real = here.real.to(p)
        for of_query in (torch.special.entr(p).sum(-1), (p * distance).sum(-1)):  # (B, heads, S)
            found.append(torch.einsum("bhq,bq->bh", of_query, real))
        return torch.stack(found, -1)


def _tokens(args: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """This rank's token ids, and which of them are no padding."""
    ids = inputs.get("input_ids", args[0] if args else None)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        given = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise FlexModelError(f"expected token ids (B, S) as input_ids, got {given}; pass them.", page="bad-argument")
    mask = inputs.get("attention_mask")
    if mask is None:
        return ids, torch.ones_like(ids)
    if mask.shape != ids.shape:
        raise FlexModelError(
            f"expected an attention_mask of the tokens' shape {tuple(ids.shape)}, got {tuple(mask.shape)}; "
            f"give one that is 0 at padding.",
            page="bad-argument",
        )
    return ids, mask
