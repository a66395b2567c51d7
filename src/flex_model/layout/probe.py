"""The probe: which dim of a value is the batch, or the sequence, and are its rows in that order?

Data-parallel ranks each see a part of the batch; the full value is their concatenation only if a model given
``[x; x]`` returns ``[f(x); f(x)]`` along one dim. That is tried, on the real model: one forward with the real inputs
and one with the batch twice over, without gradients, in eval mode; buffers, caches and random state are put back.
It refuses what shapes alone would let pass: rows sorted by expert, sequence-major rows, values reduced over the batch.
Under context parallelism the same is done along the sequence, with ``[x; x by one token on]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from flex_model.layout.record import Key, Watched, batch_size, double_batch, recorded, uncollected
from flex_model.layout.sequence import double_sequence, sequence_length
from flex_model.layout.values import close, local
from flex_model.trees import copy_tree

__all__ = ["BATCH", "SEQUENCE", "Along", "BatchDim", "Probe"]

_SMALL = 1 << 16  # elements


@dataclass(frozen=True, slots=True)
class BatchDim:
    """``dim`` holds the batch, or the sequence; None: the value has no such dim. ``refusal`` says why neither could be
    shown; ``failed``: because the model raised, which it may not do the next time."""

    dim: int | None = None
    refusal: str = ""
    failed: bool = False


@contextmanager
def _nothing_changed(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients; afterwards modes, buffers and random state are as they were."""
    training = [m for m in model.modules() if m.training]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    devices = sorted({b.device.index or 0 for b in model.parameters() if b.device.type == "cuda"})
    try:
        for module in training:
            module.training = False
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


Doubling = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Along:
    """What is doubled: its word, how, its size in the inputs, and by how much the second half is rolled."""

    word: str
    double: Doubling
    size: Callable[[Any, int], int | None]
    roll: int = 0


BATCH = Along("batch", double_batch, batch_size)
SEQUENCE = Along("sequence", double_sequence, sequence_length, roll=1)


class Probe:
    """The model on one call's inputs, and how the watched sides of its modules answer to more of them.

    ``dim`` is where the inputs hold the batch.
    """

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], watched: Watched, dim: int = 0
    ) -> None:
        self._model, self._inputs, self._watched, self._dim = model, (args, kwargs), watched, dim
        self._once: dict[Key, list[Tensor]] | None = None

    def along(self, along: Along) -> dict[Key, list[BatchDim]]:
        """{key: one BatchDim a tensor}; raises what the model raises."""

        def kept(_: Key, found: list[Tensor]) -> list[Tensor]:
            return [local(t).clone() for t in found]

        def compared(key: Key, found: list[Tensor]) -> list[BatchDim]:
            before = once.get(key, [])
            if len(before) != len(found):
                return [BatchDim(refusal=f"it fires another number of times at twice the {along.word}")] * len(found)
            return [_dim(a, local(b), size, along) for a, b in zip(before, found, strict=True)]

        size = along.size(self._inputs, self._dim)
        with _nothing_changed(self._model), uncollected():
            if self._once is None:
                self._once = self._forward(self._inputs, kept)
            once = self._once
            try:
                return self._forward(along.double(self._inputs, dim=self._dim), compared)
            except Exception:
                return self._forward(along.double(self._inputs, vectors=False, dim=self._dim), compared)

    def _forward(self, inputs: Any, keep: Callable[[Key, list[Tensor]], Any]) -> dict[Key, Any]:
        args, kwargs = copy_tree(inputs, lambda t: t.detach().clone())
        with recorded(self._watched, keep) as seen:
            self._model(*args, **kwargs)
        return seen


def _dim(once: Tensor, twice: Tensor, size: int | None, along: Along) -> BatchDim:
    """Where ``twice`` is ``once`` two times over."""
    word = along.word
    if once.dim() != twice.dim():
        return BatchDim(refusal=f"it has {once.dim()} dims, and {twice.dim()} at twice the {word}")
    before, after = once.shape, twice.shape
    grown = [d for d, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    if not grown:
        return (
            BatchDim() if close(once, twice) else BatchDim(refusal=f"it has no {word} dim, yet depends on the {word}")
        )
    dim = grown[0]
    rows = before[dim]
    if len(grown) > 1 or after[dim] != 2 * rows:
        return BatchDim(refusal=f"{tuple(before)} becomes {tuple(after)} at twice the {word}")
    if along.roll and rows != size:
        return BatchDim(refusal=f"dim {dim} has {rows} rows for {size} tokens")
    wanted = (once, once.roll(along.roll, dim) if along.roll else once)
    if not _put_together(wanted, twice, dim) and not all(map(close, wanted, twice.chunk(2, dim))):
        return BatchDim(refusal=f"the rows of dim {dim} do not follow the order of the {word}")
    if rows != size and _periodic(once, dim):
        return BatchDim(refusal=f"the rows of dim {dim} repeat themselves, so their order cannot be seen")
    return _seen_on(dim)


@cache
def _seen_on(dim: int) -> BatchDim:
    return BatchDim(dim)


def _put_together(parts: tuple[Tensor, ...], whole: Tensor, dim: int) -> bool:
    """Whether ``whole`` is exactly ``parts``: of small tensors this takes less than to look at each half of it."""
    small = whole.numel() <= _SMALL and parts[0].dtype == whole.dtype
    return small and torch.equal(torch.cat(parts, dim), whole)


def _periodic(value: Tensor, dim: int) -> bool:
    """Whether the rows are some of them over and over: then doubling the batch shows no order."""
    rows = value.shape[dim]
    for times in (n for n in (2, 3, 4, 5, 6, 8, rows) if 1 < n <= rows and rows % n == 0):
        blocks = value.chunk(times, dim)
        if all(close(blocks[0], block) for block in blocks[1:]):
            return True
    return False
