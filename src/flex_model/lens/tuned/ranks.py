"""``Ranks``: the ranks that hold a model, for work that they share out among them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from flex_model import FlexModel
from flex_model.routing.collectives import all_gather_parts

__all__ = ["Ranks"]


class Ranks:
    """``index`` of ``count``: this rank among those of the model, whatever the engine; one where it is on one process.

    Their collectives are in the library's own group: a rank that fails is told of, and nobody waits for it.
    """

    def __init__(self, fm: FlexModel) -> None:
        self._runtime = fm._runtime
        self._runtime.look()
        mesh = self._runtime.whole
        self.count, self.index = (mesh.size, mesh.me) if mesh.axes else (1, 0)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """What is raised in here ends this rank, and the others are told."""
        with self._runtime.watch.telling():
            yield

    def gather(self, mine: Tensor, what: str) -> list[Tensor]:
        """Every rank's tensor, in host memory, in the order of ranks. Collective."""
        mine = mine.detach().cpu()
        if self.count == 1:
            return [mine]
        with self._runtime.watch.at(what):
            return all_gather_parts(mine, [mine.shape] * self.count, self._runtime.whole.world)
