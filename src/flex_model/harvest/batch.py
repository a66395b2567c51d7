"""``Batch``: what a harvest takes from a loader's batch: the model's inputs, the rows to keep, what goes beside them.

All ranks iterate over the same batches; ``dealt`` is the part of one data-parallel rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flex_model.errors import HarvestError
from flex_model.harvest.share import Grid

__all__ = ["Batch", "Wanted", "as_batch"]

_OF_TOKENS = ("documents", "positions", "labels")


@dataclass(frozen=True, slots=True)
class Wanted:
    """Of every batch: which rows are kept, and which of its entries go beside them.

    ``columns``: entries that are not the model's. ``exclude``: token ids. ``positions``: an index of the sequence.
    """

    columns: tuple[str, ...] = ()
    exclude: tuple[int, ...] = ()
    positions: Any = None
    rows: str | None = None  # "tokens" | "samples"


@dataclass(frozen=True, slots=True)
class Batch:
    """``keep``: (samples, length), or (samples,) where rows are samples; ``columns`` are of the same shape."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keep: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)
    first: int = 0  # the first of its samples, in the whole batch

    @property
    def grid(self) -> Grid:
        samples = len(self.keep)
        return Grid(samples, self.keep.shape[1] if self.keep.dim() > 1 else None)

    def dealt(self, place: int, ranks: int) -> Batch:
        """The samples of one of several ranks, in order; a rank without any runs the first one for the others."""
        if ranks == 1:
            return self
        size = len(self.keep)
        low, high = place * size // ranks, (place + 1) * size // ranks
        idle = low == high
        chosen = slice(0, 1) if idle else slice(low, high)

        def part(value: Any) -> Any:
            if isinstance(value, Tensor) and value.dim() and len(value) == size:
                return value[chosen]
            return value

        mine = Batch(
            tuple(map(part, self.args)),
            {name: part(value) for name, value in self.kwargs.items()},
            self.keep[chosen],
            {name: column[chosen] for name, column in self.columns.items()},
            low,
        )
        return mine.without_rows() if idle else mine

    def as_run(self, ranks: int) -> Batch:
        """The whole batch as several ranks run it: those without samples run one that has no rows."""
        if ranks == 1 or len(self.keep) >= ranks:
            return self
        parts = [self.dealt(place, ranks) for place in range(ranks)]
        columns = {name: torch.cat([part.columns[name] for part in parts]) for name in self.columns}
        return replace(self, keep=torch.cat([part.keep for part in parts]), columns=columns)

    def without_rows(self) -> Batch:
        """It runs for other ranks only."""
        return replace(self, keep=torch.zeros_like(self.keep))

    def to(self, device: torch.device | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The model's inputs on a device, or where they are."""

        def there(value: Any) -> Any:
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) and device is not None else value

        return tuple(map(there, self.args)), {name: there(value) for name, value in self.kwargs.items()}


def as_batch(given: Any, wanted: Wanted, *, takes: Sequence[str] | None, context: int | None) -> Batch:
    """From whatever a loader gives: a ``texts.TokenBatch``, the model's keywords, or its one input.

    ``takes``: the names of the model's arguments, None where it takes any. ``context``: the number of the first one.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    own: dict[str, Any] = {}
    if isinstance(given, Mapping):
        kwargs = dict(given)
    elif isinstance(given, Tensor):
        args = (given,)
    elif isinstance(getattr(given, "input_ids", None), Tensor):
        kwargs, args, own = _of_token_batch(given, takes)
    else:
        raise HarvestError(
            f"a batch is a {type(given).__name__}; expected a dict of the model's keywords, a tensor, or a TokenBatch "
            f"of flex_model.texts.",
            page="harvest-batch",
        )
    own |= {name: kwargs.pop(name) for name in wanted.columns if name in kwargs}
    if missing := [name for name in wanted.columns if name not in own]:
        raise HarvestError(f"a batch has no {missing[0]!r}, which columns= names.", page="harvest-batch")
    ids = kwargs.get("input_ids", args[0] if args else None)
    found = [ids] if isinstance(ids, Tensor) else [v for v in kwargs.values() if isinstance(v, Tensor)]
    lead = found[0] if found else torch.empty(0)
    if not lead.dim() or not len(lead):
        raise HarvestError("a batch has no tensor with samples for the model.", page="harvest-batch")
    tokens = lead.dim() == 2 and not lead.is_floating_point() and wanted.rows != "samples"
    if wanted.rows == "tokens" and not tokens:
        raise HarvestError(
            f"rows='tokens': a batch has no token ids (B, S), but {tuple(lead.shape)}.", page="harvest-batch"
        )
    keep = torch.ones(lead.shape[: 2 if tokens else 1], dtype=torch.bool)
    if tokens:
        keep = _kept(lead.cpu(), kwargs, given, wanted)
        own.setdefault("token_ids", lead)
        own.setdefault("positions", torch.arange(lead.shape[1]).expand(lead.shape))
        if context is not None:
            own.setdefault("contexts", torch.arange(context, context + len(lead)))
    columns = {name: _column(name, value, keep) for name, value in own.items() if value is not None}
    return Batch(args, kwargs, keep, columns)


def _of_token_batch(given: Any, takes: Sequence[str] | None) -> tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]:
    own = {name: getattr(given, name, None) for name in _OF_TOKENS}
    if takes is not None and "input_ids" not in takes:
        return {}, (given.input_ids,), own
    kwargs = {"input_ids": given.input_ids}
    if takes is None or "attention_mask" in takes:
        kwargs["attention_mask"] = given.attention_mask
    return kwargs, (), own


def _kept(ids: Tensor, kwargs: Mapping[str, Any], given: Any, wanted: Wanted) -> Tensor:
    """The tokens whose rows are kept: not padding, not excluded, at the wanted positions."""
    keep = getattr(given, "keep", None)
    keep = torch.ones_like(ids, dtype=torch.bool) if keep is None else keep.cpu().bool().clone()
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        keep &= mask.cpu().bool()
    if wanted.exclude:
        keep &= ~torch.isin(ids, torch.tensor(wanted.exclude))
    if wanted.positions is not None:
        at = torch.zeros(ids.shape[1], dtype=torch.bool)
        at[wanted.positions] = True
        keep &= at
    return keep


def _column(name: str, value: Any, keep: Tensor) -> Tensor:
    """One number for each row."""
    column = torch.as_tensor(value).cpu()
    if column.shape == keep.shape[:1] and keep.dim() == 2:
        column = column[:, None].expand(keep.shape)
    if column.shape != keep.shape:
        raise HarvestError(
            f"the column {name!r} is {tuple(column.shape)}; expected {tuple(keep.shape)}, a number for each row, or "
            f"one for each sample.",
            page="harvest-batch",
        )
    return column
