"""Ranks that do something together: one does it and all know how it went, or all say what they have."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from flex_model.errors import FlexModelError
from flex_model.routing.collectives import all_gather_objects
from flex_model.routing.watch import mark_shared

if TYPE_CHECKING:
    from flex_model.core.runtime import Runtime

__all__ = ["Together"]

T = TypeVar("T")


class Together:
    """The ranks of one model, or the only one. All methods are collective."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime, whole = runtime, runtime.whole
        self.rank, self.ranks = (whole.me, whole.size) if whole.axes else (0, 1)
        self.is_main = not whole.axes or whole.is_main

    def tell(self, mine: T, what: str) -> list[T]:
        """What every rank has, in the order of the mesh."""
        if self.ranks == 1:
            return [mine]
        with self._runtime.watch.at(what):
            return all_gather_objects(mine, self._runtime.whole.control)

    def each(self, act: Callable[[], T], what: str) -> T:
        """All ranks act, each for itself; the first error of any is raised on all."""
        return self._act(act, what, shown=False)[0][0]

    def on_main(self, act: Callable[[], T], what: str) -> T:
        """The main rank acts, and all have its result, or its error."""

        def mine() -> tuple[T] | None:
            return (act(),) if self.is_main else None

        return next(result[0] for result in self._act(mine, what, shown=True)[1] if result is not None)

    def _act(self, act: Callable[[], T], what: str, *, shown: bool) -> tuple[list[T], list[T | None]]:
        """This rank's result, and where they are ``shown`` all ranks' results."""
        mine: list[T] = []
        problem: FlexModelError | None = None
        try:
            mine.append(act())
        except FlexModelError as failure:
            if self.ranks == 1:
                raise
            problem = failure
        failed = None if problem is None else (type(problem), problem.message, problem.page)
        told = self.tell((failed, mine[0] if shown and mine else None), what)
        for rank, (theirs, _) in enumerate(told):
            if theirs is not None:
                kind, message, page = theirs
                shared = kind(f"on rank {self._runtime.whole.ranks[rank]}: {message}", page=page)
                mark_shared(shared)
                raise shared from problem
        return mine, [result for _, result in told]
