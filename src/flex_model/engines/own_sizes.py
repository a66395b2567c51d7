"""Sizes that a user's module keeps for itself, such as ``self.n_local_heads = n_heads // get_world_size()``.

Layers of an engine say which of their sizes are local; a module around them does not. Its own ``__init__`` does: it is
read (``source.py``) to find, for every attribute, how it scales with the number of ranks. What is not understood is
named, and so is what was built with a local size: nobody knows what it would be without the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from flex_model.engines.source import Calls, Local, Reader, names_in

__all__ = ["Calls", "Local", "own_sizes", "uses", "whole_value"]


def whole_value(value: Any, local: Local, ranks: int) -> Any:
    """A local attribute as it is without the ranks; raises ValueError where it cannot be said."""
    if local.problem:
        raise ValueError(local.problem)
    if local.is_rank:
        return 0
    if local.dims is not None:
        shape = value.shape if isinstance(value, Tensor) else value
        if not isinstance(shape, (tuple, list)) or len(shape) != len(local.dims):
            raise ValueError("it is not the tensor or shape that __init__ makes")
        whole = [_times(size, power, ranks) for size, power in zip(shape, local.dims, strict=True)]
        if not isinstance(value, Tensor):
            return type(value)(whole)
        device = "meta" if value.is_floating_point() else value.device
        return torch.zeros(whole, dtype=value.dtype, device=device)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("it is not the number that __init__ makes")
    return _times(value, local.power, ranks)


def _times(value: Any, power: int, ranks: int) -> Any:
    if power >= 0:
        return value * ranks**power
    if value % ranks**-power:
        raise ValueError(f"{value} cannot be divided by {ranks} ranks")
    return value // ranks**-power


# -- what a class says -------------------------------------------------------------------------------------------
def _own_classes(cls: type) -> list[type]:
    """The classes a user wrote, the base first."""
    return [c for c in reversed(cls.__mro__) if c is not object and not c.__module__.startswith("torch.")]


def _methods(cls: type) -> Iterator[Any]:
    return (f for f in (getattr(m, "__func__", m) for m in vars(cls).values()) if hasattr(f, "__code__"))


def uses(module: nn.Module, names: frozenset[str]) -> frozenset[str]:
    """Which of ``names`` the bytecode of a module's methods looks up."""
    kind: Any = type(module)
    return _uses(kind, names)


@cache
def _uses(cls: type, names: frozenset[str]) -> frozenset[str]:
    found: set[str] = set()
    for own in _own_classes(cls):
        for method in _methods(own):
            found |= names_in(method.__code__)
    return names & found


def own_sizes(module: nn.Module, calls: Calls) -> dict[str, Local]:
    """{attribute: how it scales} of what a module keeps and would not be the same without the ranks."""
    kind: Any = type(module)
    return _own_sizes(kind, calls)


@cache
def _own_sizes(cls: type, calls: Calls) -> dict[str, Local]:
    reader = Reader(calls)
    for own in _own_classes(cls):
        for method in _methods(own):
            asks = names_in(method.__code__) & (calls.sizes | calls.ranks | calls.groups)
            if method.__name__ == "__init__" or (asks and method.__name__ != "forward"):
                reader.read(method)
    return {name: local for name, local in reader.kept.items() if not local.same}
