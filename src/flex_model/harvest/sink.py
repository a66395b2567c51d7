"""``Taking``: what one rank takes of each step: its rows of every site, on their way to host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flex_model.errors import FlexModelError, HarvestError
from flex_model.harvest.batch import Batch
from flex_model.harvest.share import Share, Way, cuts
from flex_model.layout.layout import Layout
from flex_model.routing.copies import Copies

__all__ = ["Step", "Taking"]

_WHOLE = Layout((), "one process")
_PARTS = 2**32  # of one data-parallel rank with batches of its own
_NARROW = (torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


@dataclass(frozen=True, slots=True)
class Piece:
    """Some columns of a site's rows, from the ``start``-th on. ``sums``: of each column the numbers and their squares,
    (2, columns) in float64, where they were made on a device."""

    rows: Tensor
    start: int
    sums: Tensor | None = None

    @property
    def fits(self) -> bool:
        """Whether no number was lost in a narrower dtype."""
        if self.rows.dtype not in _NARROW:
            return True
        return bool((self.rows.float() if self.sums is None else self.sums).isfinite().all())


@dataclass(slots=True)
class Step:
    """One step of one rank. ``parts``: of each site's rows, their places in the step and their numbers."""

    number: int
    batch: Batch
    values: dict[str, list[Piece]] = field(default_factory=dict)
    met: set[str] = field(default_factory=set)
    ready: Callable[[], None] = lambda: None
    parts: dict[str, list[tuple[int, int]]] = field(default_factory=dict)


class Taking:
    """A sink of shards. Before ``shares`` are known it keeps the first step's shards as they are."""

    def __init__(self, copies: Copies, dtype: torch.dtype | None, *, rank: int, own_batches: bool) -> None:
        self.first: dict[str, tuple[Tensor, Layout]] = {}
        self.shares: dict[str, Share] | None = None
        self.nothing: dict[str, str] = {}  # {site: what a module gave instead of a tensor}
        self.refused: dict[Any, Exception] = {}
        self.error: FlexModelError | None = None
        self.memory: Callable[[tuple[int, int], torch.dtype], Tensor] = _new  # on the host
        self._copies, self._dtype = copies, dtype
        self._rank, self._own = rank, own_batches  # among the data-parallel ranks
        self._ways: frozenset[Way] = frozenset()
        self._now: Step | None = None
        self._index: dict[Way, tuple[Tensor | None, list[tuple[int, int]]]] = {}

    def know(self, shares: dict[str, Share], ways: Iterable[Way]) -> None:
        self.shares, self._ways = shares, frozenset(ways)

    def begin(self, number: int, batch: Batch) -> None:
        self._now, self._index = Step(number, batch), {}

    def meet(self, key: Any, local: Tensor, layout: Layout) -> None:
        """A site's shard, when it fires. What fails is told when the ranks meet, not in the middle of a forward."""
        try:
            self._meet(str(key), local, layout)
        except FlexModelError as error:
            self.error = self.error or error

    def _meet(self, name: str, local: Tensor, layout: Layout) -> None:
        step = self._now
        assert step is not None
        if name in step.met:
            raise HarvestError(
                f"{name!r} fired twice in step {step.number}, so that it has two rows for each token; harvest a site "
                f"that fires once.",
                page="harvest-rows",
            )
        step.met.add(name)
        if self.shares is None:
            self.first[name] = (local.detach().clone(), layout)
        else:
            self._take(name, local, step)

    def put(self, key: Any, value: Any) -> None:
        """A whole value, where these are delivered."""
        if isinstance(value, Tensor):
            self.meet(key, value, _WHOLE)
        else:
            self.error = self.error or HarvestError(
                f"{key!r} has no whole value, but parts of ranks; harvest what the layer puts out.", page="harvest-rows"
            )

    def empty(self, key: Any, reason: str) -> None:
        self.nothing[str(key)] = reason

    def refuse(self, key: Any, error: Exception) -> None:
        self.refused[key] = error

    def again(self) -> None:
        """Take the first step's shards, now that it is known what to take of them."""
        first, self.first = self.first, {}
        assert self._now is not None
        for name, (local, _) in first.items():
            self._take(name, local, self._now)

    def _take(self, name: str, local: Tensor, step: Step) -> None:
        assert self.shares is not None
        share = self.shares[name]
        index, parts = self.rows_of(share.way, share.positions)
        dtype = local.dtype if self._dtype is None else self._dtype
        rows = share.rows(local)
        keep = self._on_host if local.device.type == "cpu" else self._leaving
        step.values[name] = [keep(r, start, index, dtype) for r, (_, start) in zip(rows, share.columns, strict=True)]
        step.parts[name] = parts

    def _on_host(self, rows: Tensor, start: int, index: Tensor | None, dtype: torch.dtype) -> Piece:
        """Chosen, cast and copied at once, into memory that is used again: new memory takes longer than the copy."""
        count = len(rows) if index is None else len(index)
        out = self.memory((count, rows.shape[1]), dtype)
        if index is not None and dtype == rows.dtype:
            torch.index_select(rows, 0, index, out=out)
        else:
            out.copy_(rows if index is None else rows.index_select(0, index))
        return Piece(out, start)

    def _leaving(self, rows: Tensor, start: int, index: Tensor | None, dtype: torch.dtype) -> Piece:
        """Chosen, cast and summed where they are, and copied to the host beside the model."""
        chosen = rows if index is None else rows.index_select(0, index.to(rows.device, non_blocking=True))
        cast, host = chosen.to(dtype), torch.device("cpu")
        wide = cast.to(torch.float32 if cast.element_size() <= 2 else torch.float64)  # in which squares are exact
        sums = torch.stack([x.sum(0, dtype=torch.float64) for x in (wide, wide * wide)])
        kept = self._copies.take(cast, host, owned=index is not None or cast is not rows)
        return Piece(kept, start, self._copies.take(sums, host, owned=True))

    def rows_of(
        self, way: Way, positions: Callable[[int | None], Tensor | None]
    ) -> tuple[Tensor | None, list[tuple[int, int]]]:
        """Which rows of a shard are kept (None: all), and of which parts of the step these are."""
        if way not in self._index:
            assert self._now is not None
            batch = self._now.batch
            mine = positions(batch.grid.length)
            keep = batch.keep if mine is None else batch.keep[:, mine]
            index = None if bool(keep.all()) else keep.reshape(-1).nonzero().squeeze(1)
            self._index[way] = index, self._parts(batch, keep, mine)
        return self._index[way]

    def _parts(self, batch: Batch, keep: Tensor, mine: Tensor | None) -> list[tuple[int, int]]:
        length = batch.grid.length
        if length is None or not any(self._ways):  # each data-parallel rank's rows are one part
            return [(self._rank, int(keep.sum()))] if keep.any() else []
        edges = cuts(length, self._ways)
        at = torch.arange(length) if mine is None else mine
        cell = torch.bucketize(at, torch.tensor(edges[1:-1]), right=True)
        cells = len(edges) - 1
        counts = torch.zeros(len(keep), cells, dtype=torch.long).index_add_(1, cell, keep.long()).flatten()
        first = self._rank * _PARTS if self._own else batch.first * cells
        return [(first + place, int(counts[place])) for place in counts.nonzero().flatten().tolist()]

    def end(self) -> Step:
        """The step is over; its values are there after ``ready()``."""
        step, self._now = self._now, None
        assert step is not None and self.shares is not None
        if missing := sorted(self.shares.keys() - step.met):
            error = HarvestError(
                f"{missing[0]!r} did not fire in step {step.number}, so that it has no rows there; harvest sites that "
                f"every forward runs.",
                page="harvest-rows",
            )
            self.error = self.error or error
        step.ready = self._copies.fence()
        return step


def _new(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)
