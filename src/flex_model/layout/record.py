"""Forwards that nobody else sees: what passes the watched modules, and inputs of twice the batch."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flex_model.trees import copy_tree, find_leaves, tensors

__all__ = ["Key", "Watched", "batch_size", "double_batch", "input_kind", "recorded", "uncollected"]


Watched = dict[tuple[str, str], nn.Module]  # by name and side


class Key(NamedTuple):
    """A side of a module at one of its firings within a forward."""

    name: str
    side: str  # "in" | "out"
    occurrence: int = 0


@contextmanager
def recorded(watched: Watched, keep: Callable[[Key, list[Tensor]], Any]) -> Iterator[dict[Key, Any]]:
    """{key: keep(key, tensors in flattening order)} of the watched sides of modules."""
    seen: dict[Key, Any] = {}
    counts: dict[tuple[str, str], int] = {}

    def note(place: tuple[str, str], value: Any) -> None:
        count = counts.get(place, 0)
        counts[place] = count + 1
        key = Key(*place, count)
        seen[key] = keep(key, tensors(value))

    handles = []
    for place, module in watched.items():
        if place[1] == "in":
            handles.append(
                module.register_forward_pre_hook(lambda m, a, k, place=place: note(place, (a, k)), with_kwargs=True)
            )
        else:
            handles.append(module.register_forward_hook(lambda m, a, o, place=place: note(place, o)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def uncollected() -> Iterator[None]:
    """Nothing is looked for that only refers to itself: of the many small objects made in here most live on, and each
    search goes through all that the process has."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def batch_size(inputs: Any, dim: int = 0) -> int | None:
    """The size of ``dim`` of the first input tensor that has one."""
    return next((t.shape[dim] for t in tensors(inputs) if t.dim() > dim), None)


def input_kind(inputs: Any) -> tuple[tuple[str, int, bool], ...]:
    """What of a call's inputs decides how values lie: which tensors there are, their dims, and which have the batch."""
    batch = batch_size(inputs)
    return tuple((x.path, x.tensor.dim(), x.tensor.shape[:1] == (batch,)) for x in find_leaves(inputs))


def double_batch(inputs: Any, *, vectors: bool = True, dim: int = 0, times: int = 2) -> Any:
    """``inputs`` with the batch twice (``times``) over: tensors whose ``dim`` is the batch are repeated.

    ``vectors=False`` leaves one-dim tensors alone: a position vector may be as long as the batch by accident.
    """
    batch = batch_size(inputs, dim)

    def twice(tensor: Tensor) -> Tensor:
        if tensor.dim() > max(dim, 0 if vectors else 1) and tensor.shape[dim] == batch:
            return torch.cat([tensor] * times, dim)
        return tensor

    return copy_tree(inputs, twice)
