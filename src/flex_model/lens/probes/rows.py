"""What probes are trained on: values of a component beside their labels, of whole batches, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from flex_model import FlexModel, FlexModelError
from flex_model.components.place import Place
from flex_model.edits.places import last_columns
from flex_model.lens.inputs import Inputs, keywords
from flex_model.lens.whole import whole

__all__ = ["IGNORED", "Batches", "Read", "Rows", "collect"]

Batches = Iterable[tuple[Inputs, Any]]
Read = Literal["last", "mean", "every", "all"]  # which tokens a row is made of; "all": a row is a whole sequence

IGNORED = -100  # the label of what is left out, as of torch's cross_entropy
_SHARED = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")  # inputs with rows and tokens


@dataclass(frozen=True, slots=True)
class Rows:
    """``values`` by key, in float32 and host memory: ``(N, D)``, or ``(N, S, D)`` of whole sequences with ``mask``
    ``(N, S)``; ``labels`` ``(N,)`` are integers or floats."""

    values: dict[str, Tensor]
    labels: Tensor
    mask: Tensor | None

    @property
    def regression(self) -> bool:
        return self.labels.is_floating_point()


class _Batch(NamedTuple):
    """The whole of one batch, without its values."""

    mask: Tensor  # (B, S), what is no padding
    labels: Tensor  # (B,) or (B, S)
    kept: Tensor  # as the labels
    number: int


@torch.no_grad()
def collect(fm: FlexModel, batches: Batches, place: Place, read: Read, step: Callable[[], object]) -> Rows:
    """One forward a batch; of every value only what is read is kept. Collective.

    Which columns hold a last token is known before the forward, so that only these move.
    """
    parts: dict[str, list[Tensor]] = {key: [] for key in place.keys}
    labels, masks = [], []
    for number, pair in enumerate(batches):
        inputs, batch = _whole_batch(fm, pair, number, read)
        last = last_columns(batch.mask)
        columns = sorted(set(last.tolist())) if read == "last" else None
        with fm.capture(place, select=None if columns is None else (slice(None), columns)) as acts:
            fm(**inputs)
        for key, kept in parts.items():
            value = _checked(key, whole(acts, key), batch, columns)
            if columns is not None:
                value = value[torch.arange(len(value)), torch.searchsorted(torch.tensor(columns), last)]
            kept.append(_read(key, value, batch, read))
        labels.append(batch.labels[batch.kept])
        masks.append(batch.mask[batch.kept] if read == "all" else batch.mask)
        step()
    if not labels:
        raise FlexModelError("there are no batches to read; give (inputs, labels) pairs.", page="bad-argument")
    kinds = {t.dtype for t in labels}
    if len(kinds) > 1:
        raise FlexModelError(
            f"labels are of several kinds, {', '.join(sorted(map(str, kinds)))}; give integers in all batches, or "
            f"floats in all.",
            page="bad-argument",
        )
    return Rows(
        {key: _joined(parts.pop(key)) for key in place.keys},  # one at a time: twice its memory, not all of it twice
        torch.cat(labels),
        _joined(masks) if read == "all" else None,
    )


def _whole_batch(fm: FlexModel, pair: Any, number: int, read: Read) -> tuple[Mapping[str, Any], _Batch]:
    """This rank's inputs, and the whole labels. What is wrong with one rank's part is told on all."""
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], (Tensor, Mapping))):
        raise FlexModelError(
            f"batch {number} is a {type(pair).__name__}; expected a pair (inputs, labels).",
            page="bad-argument",
        )
    inputs, given = keywords(pair[0]), pair[1]
    shared = {k: v for k in _SHARED if isinstance(v := inputs.get(k), Tensor) and v.dim() > 1}
    tokens = shared.get("input_ids", shared.get("inputs_embeds"))
    if tokens is None:
        raise FlexModelError(f"batch {number} has neither input_ids nor inputs_embeds.", page="bad-argument")
    try:
        told = torch.atleast_1d(torch.as_tensor(given, device=tokens.device))
    except (TypeError, ValueError, RuntimeError):
        raise FlexModelError(
            f"labels of batch {number} are a {type(given).__name__}; expected a tensor or numbers.", page="bad-argument"
        ) from None
    short = torch.tensor([len(told) - len(tokens)], device=tokens.device)
    full = fm.full_batch({**shared, "labels": told, "short": short})
    wrong = [int(n) for n in full["short"] if n]
    if wrong:
        raise FlexModelError(
            f"batch {number} has {len(tokens) + wrong[0]} labels for {len(tokens)} rows on a rank; give one a row.",
            page="bad-argument",
        )
    tokens = full.get("input_ids", full.get("inputs_embeds"))
    mask = full.get("attention_mask", torch.ones(tokens.shape[:2])).cpu().bool()
    if mask.shape != tokens.shape[:2]:
        raise FlexModelError(
            f"batch {number} has an attention_mask {tuple(mask.shape)} for tokens {tuple(tokens.shape[:2])}; a probe "
            f"needs (batch, sequence).",
            page="bad-argument",
        )
    return inputs, _labelled(mask, full["labels"].cpu(), number, read)


def _labelled(mask: Tensor, labels: Tensor, number: int, read: Read) -> _Batch:
    shape = mask.shape if read == "every" else mask.shape[:1]
    if labels.shape != shape:
        what = "a token" if read == "every" else "a row; tokens='every' takes one a token"
        raise FlexModelError(
            f"batch {number} has labels {tuple(labels.shape)}; expected {tuple(shape)}, one {what}.",
            page="bad-argument",
        )
    if labels.is_floating_point():
        labels, kept = labels.float(), torch.ones(shape, dtype=torch.bool)
    else:
        labels, kept = labels.long(), labels != IGNORED
    kept = kept & mask if read == "every" else kept
    if read != "every" and not bool(mask.any(1)[kept].all()):
        raise FlexModelError(f"batch {number} has a row of padding alone; leave it out.", page="bad-argument")
    if not bool(labels[kept].isfinite().all()):
        raise FlexModelError(f"batch {number} has labels that are not finite.", page="bad-argument")
    return _Batch(mask, labels, kept, number)


def _checked(key: str, value: Tensor, batch: _Batch, columns: list[int] | None) -> Tensor:
    """(B, S or the columns, D) in host memory, heads side by side."""
    value = value.cpu()
    length = batch.mask.shape[1] if columns is None else len(columns)
    if value.dim() not in (3, 4) or tuple(value.shape[:2]) != (len(batch.mask), length):
        raise FlexModelError(
            f"{key!r} is no value (batch, sequence, width) of {len(batch.mask)} rows: what was captured has the shape "
            f"{tuple(value.shape)}; train on another component.",
            page="bad-argument",
        )
    return value.flatten(2) if value.dim() == 4 else value


def _read(key: str, value: Tensor, batch: _Batch, read: Read) -> Tensor:
    """What a probe is trained on, in float32."""
    value, mask = value.float(), batch.mask[..., None]
    if read in ("mean", "all"):
        value = value.masked_fill(~mask, 0)  # a model may give anything at padding
    if read == "mean":
        value = value.sum(1) / mask.sum(1).clamp_min(1)
    value = value[batch.kept]
    if not bool(value.isfinite().all()):
        raise FlexModelError(
            f"{key!r} has values that are not finite in batch {batch.number}; run the model in another dtype.",
            page="bad-argument",
        )
    return value


def _joined(parts: list[Tensor]) -> Tensor:
    """One tensor, sequences padded to the longest."""
    if parts[0].dim() > 1 and len({p.shape[1] for p in parts}) > 1:
        longest = max(p.shape[1] for p in parts)
        parts = [nn.functional.pad(p, (0, 0) * (p.dim() - 2) + (0, longest - p.shape[1])) for p in parts]
    return torch.cat(parts)
