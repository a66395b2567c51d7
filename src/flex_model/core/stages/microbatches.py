"""A step's values from those of its microbatches, in the order of the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flex_model.core.call import Staged
from flex_model.errors import LayoutError
from flex_model.layout.probe import BatchDim
from flex_model.layout.values import close

__all__ = ["merge_microbatches"]


def merge_microbatches(
    staged: Sequence[Staged], microbatches: int, divide: int
) -> tuple[list[Staged], list[tuple[Staged, LayoutError]]]:
    """One value of each place that was met in every microbatch, in the order of the first; and what is refused.

    Values are put together along their batch dim, and so are gradients; gradients of what has no batch dim are summed.
    ``divide`` is what the schedule divides gradients by.
    """
    places: dict[tuple[object, ...], list[Staged]] = {}
    for one in staged:
        places.setdefault((id(one.bound), one.key, one.gradient, one.occurrence), []).append(one)
    whole, refused = [], []
    for parts in places.values():
        parts.sort(key=lambda s: s.microbatch)
        first = parts[0]
        local = _merge([s.local for s in parts], first.batch, microbatches, first.gradient, first.bound.where)
        if isinstance(local, LayoutError):
            refused.append((first, local))
            continue
        first.local = local / divide if first.gradient and divide != 1 else local
        whole.append(first)
    return whole, refused


def _merge(
    parts: list[Tensor], batch: BatchDim | None, microbatches: int, gradient: bool, where: str
) -> Tensor | LayoutError:
    if microbatches == 1 and len(parts) == 1:
        return parts[0]
    if len(parts) != microbatches:
        return LayoutError(
            f"{where}: the full value is unknown: it ran in {len(parts)} of the step's {microbatches} microbatches; "
            f"hook a module that runs in each.",
            page="microbatches",
        )
    if batch is None or batch.refusal:
        why = batch.refusal if batch is not None else "it did not fire while the batch was probed"
        return LayoutError(
            f"{where}: its microbatches cannot be put together: {why}; hook a module that keeps the batch dim.",
            page="microbatches",
        )
    if batch.dim is not None:
        return torch.cat(parts, batch.dim)
    if gradient:
        return torch.stack(parts).sum(0)
    if not all(close(parts[0], p) for p in parts[1:]):
        return LayoutError(
            f"{where}: its microbatches cannot be put together: they differ and have no batch "
            f"dim; hook a module that keeps it.",
            page="microbatches",
        )
    return parts[0]
