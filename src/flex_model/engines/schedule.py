"""Watching a pipeline's schedule, which tells nobody when a step or a microbatch begins and ends: some of its functions
run inside contexts of ours, where they are looked up, from the day there is somebody to tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any
from weakref import WeakSet

from torch import nn

from flex_model.engines.engine import Conductor

__all__ = ["Conductors", "watch"]


class Conductors:
    """Those to tell of one engine's schedules."""

    def __init__(self) -> None:
        self._all: WeakSet[Any] = WeakSet()

    def add(self, conductor: Conductor) -> None:
        self._all.add(conductor)

    def __iter__(self) -> Iterator[Conductor]:
        return iter(list(self._all))

    def look(self) -> None:
        """A step begins: stages may have been made since the last."""
        for conductor in self:
            conductor.look()

    @contextmanager
    def inside(
        self, modules: Sequence[nn.Module | None], context: Callable[[Conductor], AbstractContextManager[None]]
    ) -> Iterator[None]:
        """In the contexts of the conductors that one of ``modules`` concerns."""
        with ExitStack() as stack:
            for conductor in self:
                if any(m is not None and conductor.holds(m) for m in modules):
                    stack.enter_context(context(conductor))
            yield


def watch(
    owner: Any,
    name: str,
    context: Callable[..., AbstractContextManager[Any]],
    after: Callable[[Any, Any], None] = lambda entered, out: None,
) -> None:
    """Calls of a function of ``owner`` run inside ``context(*args)``; then comes ``after(what it yields, out)``."""
    inner = getattr(owner, name)

    @wraps(inner)
    def watched(*args: Any, **kwargs: Any) -> Any:
        with context(*args, **kwargs) as entered:
            out = inner(*args, **kwargs)
        after(entered, out)
        return out

    setattr(owner, name, watched)
