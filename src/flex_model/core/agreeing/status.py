"""``Status``: what ranks say to one another at a point that all of them pass, before anything moves.

One small exchange between hosts: has anything failed, do all ranks hold the same values, have they edited the same
sites? The names of what failed, or differs, travel only then.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NoReturn
from zlib import crc32

import torch

from flex_model.core.bound import Bound
from flex_model.core.hook_function import Call
from flex_model.errors import DeliveryError, EditError, FlexModelError, MismatchError, summary
from flex_model.routing.collectives import all_gather_ints, all_gather_objects, extremes
from flex_model.routing.watch import mark_shared

if TYPE_CHECKING:
    from flex_model.core.runtime import Runtime

__all__ = ["ON_SHARDS", "Row", "Status", "told_to_all"]

ON_SHARDS = "on shards"
_LEAST, _MOST = -1, 2**40  # less and more than any mark
Row = tuple[int, int, int]  # of a rank: number of values, new claims, mark of the values' places


class Status:
    """The failures of one rank that others do not know of yet, and the sites at which it met them in edits."""

    def __init__(self, runtime: Runtime, drop: Callable[[], None]) -> None:
        self.runtime, self._drop = runtime, drop
        self.failures: list[dict[str, Any]] = []
        self.edits: list[str] = []
        self.selections: dict[str, str] = {}  # {site: how its selection was made here}; none where none was

    def clear(self) -> None:
        self.failures.clear()
        self.edits.clear()
        self.selections.clear()

    def note_failure(self, bound: Bound, call: Call, error: BaseException) -> None:
        self.note("the editing function", bound.where, error, call.index)

    def note(self, what: str, where: str, error: BaseException, call: int | None = None) -> None:
        """Something of this rank's own failed: the next point tells everybody."""
        self.failures.append(
            {
                "what": what,
                "where": where,
                "rank": self.runtime.whole.rank,
                "call": self.runtime.calls - 1 if call is None else call,
                "error": summary(error),
                "page": getattr(error, "page", ""),
                "traceback": "".join(traceback.format_exception(error)),
            }
        )

    def exchange(self, places: Sequence[tuple[str, Any]], claims: int = 0) -> list[Row]:
        """One small exchange: has anything failed, and have all ranks edited the same sites? Else the rows of
        every rank of this stage, once where they agree."""
        mesh, whole = self.runtime.mesh, self.runtime.whole
        edits, self.edits = self.edits, []
        selections, self.selections = self.selections, {}
        made = [_mark(sorted(_kinds(selections).items()))] * 2 if selections else [_LEAST, _MOST]
        row = [len(self.failures), len(places), claims, _mark(places), _mark((self.runtime.hooks_mark, edits)), *made]
        low, high = extremes(torch.tensor(row), whole.control)
        if high[0]:
            self._raise_failure()
        if mesh is not whole and mesh.axes and not torch.equal(low, high):  # other stages hold other modules
            low, high = extremes(torch.tensor(row), mesh.world)
        if not mesh.axes or torch.equal(low, high):
            return [tuple(row[1:4])]  # type: ignore[list-item]
        if low[4] != high[4] and not self.runtime.installed.uneven:
            self._raise_mismatch(edits)
        if high[5] > low[6]:  # of the ranks that made any
            self._compare_selections(selections)
        return [(r[0], r[1], r[2]) for r in all_gather_ints(row[1:4], mesh.world)]

    def _raise_failure(self) -> NoReturn:
        everyone = all_gather_objects(self.failures, self.runtime.whole.control)
        self.failures = []
        self._drop()
        first = next(f for theirs in everyone for f in theirs)
        raise EditError(
            f"{first['where']}: {first['what']} failed on rank {first['rank']} in call {first['call']} with "
            f"{first['error']}; caches, buffers and gradients of this call are undefined.\n{first['traceback']}",
            page=first["page"],
        )

    def _raise_mismatch(self, edits: list[str]) -> NoReturn:
        """Ranks exchanged values at different sites, so that some of them met the wrong ones."""
        mesh = self.runtime.mesh
        everyone = all_gather_objects((self.runtime.hooks_mark, edits), mesh.world)
        self._drop()
        if len({mark for mark, _ in everyone}) > 1:
            marks = dict(zip(mesh.ranks, (m[:8] for m, _ in everyone), strict=True))
            raise MismatchError(f"ranks have different hooks (marks of them by rank: {marks}); register them on all.")
        place = next(i for i, sites in enumerate(zip_longest(*(e for _, e in everyone))) if len(set(sites)) > 1)
        here = [e[place] if place < len(e) else "nothing" for _, e in everyone]
        met = dict(zip(mesh.ranks, here, strict=True))
        raise MismatchError(
            f"edit {place} of this call was made at different sites (by rank: {met}); a branch that depends on the "
            f"rank has skipped a hooked module, and what the edits saw is undefined. Run the same modules on all ranks."
        )

    def _compare_selections(self, selections: dict[str, str]) -> None:
        """Ranks must take a selection alike: from their own shards, or from the whole."""
        mesh = self.runtime.mesh
        everyone = all_gather_objects(selections, mesh.world)
        for where in sorted({site for theirs in everyone for site in theirs}):
            made = {rank: theirs[where] for rank, theirs in zip(mesh.ranks, everyone, strict=True) if where in theirs}
            if len(set(_kinds(made).values())) > 1:
                self._drop()
                raise EditError(
                    f"{where}: select does other things on some ranks (by rank: {made}); let it do the same."
                )

    def same_on_all(self, rows: Sequence[Row]) -> None:
        if len({(count, mark) for count, _, mark in rows}) > 1:
            counts = dict(zip(self.runtime.mesh.ranks, [r[0] for r in rows], strict=True))
            raise DeliveryError(
                f"ranks captured different values in this call (values by rank: {counts}); every rank must register "
                f"the same hooks in the same order and run the same modules.",
                page="ranks-differ",
            )


def _kinds(selections: dict[Any, str]) -> dict[Any, bool]:
    """Without the reasons, which may be worded by the rank."""
    return {key: made == ON_SHARDS for key, made in selections.items()}


def _mark(value: object) -> int:
    return crc32(repr(value).encode())


@contextmanager
def told_to_all() -> Iterator[None]:
    """An error of this library's that is raised in here is raised on every rank."""
    try:
        yield
    except FlexModelError as error:
        mark_shared(error)
        raise
