"""``Outbox``: what a model has captured and not delivered yet, and the points where it goes out.

Delivery is collective, so it happens only where every rank passes: the end of a forward in lockstep, the end of a
backward, ``flush``. At such a point claims are settled, failures told to everybody, and values moved.
"""

from __future__ import annotations

import traceback
from functools import partial
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from torch import Tensor

from flex_model.core.bound import Bound, check_expected
from flex_model.core.call import Staged
from flex_model.core.hook_function import Call
from flex_model.core.inference import Form
from flex_model.errors import DeliveryError, EditError, LayoutError
from flex_model.layout.claim import Claim
from flex_model.layout.layout import Layout
from flex_model.routing.collectives import all_gather_ints, all_gather_objects
from flex_model.routing.delivery import Buffers, Item, deliver
from flex_model.routing.route import gradient_scale

if TYPE_CHECKING:
    from flex_model.core.runtime import Runtime

__all__ = ["Outbox"]

Refused = tuple[Bound, Any, LayoutError]


class Outbox:
    """Staged values, unsettled claims, failures and refusals of one model."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.waiting: list[Staged] = []
        self.claims: dict[Form, Claim] = {}
        self.failures: list[dict[str, Any]] = []
        self.refused: list[Refused] = []
        self._buffers = Buffers()

    def point(self, *, edited: bool = False) -> None:
        """All ranks are here: settle what was claimed, tell of failures, deliver what waits. Collective."""
        if not self.runtime.mesh.axes:
            return
        if self.claims:
            claims, self.claims = self.claims, {}
            self.runtime.inference.settle(claims)
        staged, self.waiting = self.waiting, []
        refused, self.refused = self.refused, []
        items = [i for s in staged if (i := self.item(s, refused)) is not None]
        if edited or any(i.layout.moving_axes and i.mode != "local" for i in items):
            self.status(items)
        self.deliver(items)
        self.raise_refused(refused)

    def discard(self, bounds: list[Bound]) -> None:
        """Forget what these hooks have staged: their block has ended with an exception."""
        self.waiting = [s for s in self.waiting if not any(s.bound is b for b in bounds)]

    def item(self, staged: Staged, refused: list[tuple[Bound, Any, LayoutError]]) -> Item | None:
        bound, layout = staged.bound, staged.layout
        if layout is None:
            assert staged.form is not None
            found = self.runtime.inference.known[staged.form]
            if isinstance(found, LayoutError):
                refused.append((bound, staged.key, found))
                return None
            layout = found
        local, finish = staged.local, None
        if bound.selection is not None and not staged.selected:
            taken = self.select_on_shards(bound, local, layout)
            if taken is not None:
                local, layout = taken
            else:
                finish = bound.selection.take
        sink = bound.gradient_sink if staged.gradient and not bound.is_gradient else bound.sink
        assert sink is not None
        scale = (
            gradient_scale(self.runtime.mesh, layout, range(len(self.runtime.mesh.axes))) if staged.gradient else 1.0
        )
        key = staged.key

        check = None if bound.selection is not None else partial(check_expected, bound)

        def put(full: Any) -> None:
            sink.put(
                key,
                full if not isinstance(full, Tensor) or self.runtime.device is None else full.to(self.runtime.device),
            )

        return Item(bound.where, local, layout, bound.deliver, put, scale, finish, check)

    def select_on_shards(self, bound: Bound, local: Tensor, layout: Layout) -> tuple[Tensor, Layout] | None:
        """The selection of this rank's shard and its layout; None if it can only be made from the whole."""
        assert bound.selection is not None
        sizes = {i: a.size for i, a in enumerate(self.runtime.mesh.axes)}
        new = bound.selection.on_shards(layout, tuple(local.shape), sizes)
        return None if new is None else (bound.selection.take(local), new)

    def deliver(self, items: list[Item]) -> None:
        if self.runtime.device_of_values.type == "cuda":
            torch.cuda.current_stream().synchronize()  # asynchronous copies are readable from here on
        with torch.inference_mode(False):
            deliver(items, self.runtime.mesh, self._buffers)

    def status(self, items: list[Item]) -> None:
        """One small exchange: does everybody hold the same values, and did nobody's edit fail?"""
        mark = crc32("|".join(i.where for i in items).encode())
        rows = all_gather_ints(
            [len(self.failures), len(items), mark], self.runtime.mesh.world, self.runtime.device_of_values
        )
        if any(r[0] for r in rows):
            everyone = all_gather_objects(self.failures, self.runtime.mesh.world)
            self.failures = []
            first = next(f for theirs in everyone for f in theirs)
            raise EditError(
                f"{first['where']}: the editing function failed on rank {first['rank']} in call {first['call']} with "
                f"{first['error']}; caches, buffers and gradients of this call are undefined.\n{first['traceback']}"
            )
        if len({tuple(r) for r in rows}) > 1:
            counts = dict(zip(self.runtime.mesh.ranks, [r[1] for r in rows], strict=True))
            raise DeliveryError(
                f"ranks captured different values in this call (values by rank: {counts}); every rank must register "
                f"the same hooks in the same order and run the same modules."
            )

    def note_failure(self, bound: Bound, call: Call, error: BaseException) -> None:
        lines = "".join(traceback.format_exception(error))
        self.failures.append(
            {
                "where": bound.where,
                "rank": self.runtime.mesh.rank,
                "call": call.index,
                "error": f"{type(error).__name__}: {error}",
                "traceback": lines,
            }
        )

    def refuse(self, bound: Bound, key: Any, error: LayoutError) -> None:
        self.refused.append((bound, key, error))

    def raise_refused(self, refused: list[tuple[Bound, Any, LayoutError]]) -> None:
        """A refusal is told where the value is asked for, if somebody can ask there; else at once, on every rank."""
        for bound, key, error in refused:
            sink = bound.sink if bound.sink is not None else bound.gradient_sink
            told = getattr(sink, "refuse", None)
            if told is None or bound.edit is not None:
                raise error
            told(key, error)

    def flush(self) -> None:
        """Deliver all that still waits. Collective, also for ranks that hold less than others."""
        if not self.runtime.mesh.axes:
            return
        if not self.runtime.engines.lockstep:
            self._align()
        self.point(edited=bool(self.failures) or not self.runtime.engines.lockstep)

    def _align(self) -> None:
        """Ranks may have run different numbers of forwards: the k-th value of a key is the k-th on every rank."""
        mine = [(s.bound.where, repr(s.key), str(s.local.dtype), tuple(s.local.shape)) for s in self.waiting]
        everyone = all_gather_objects((mine, {f: None for f in self.claims}), self.runtime.mesh.world)
        if all(theirs[0] == everyone[0][0] for theirs in everyone):
            return
        self._pad([theirs[0] for theirs in everyone])

    def _pad(self, everyone: list[list[tuple[str, str, str, tuple[int, ...]]]]) -> None:
        """Stand in with no rows for the values of calls that this rank did not run."""
        by_key: dict[tuple[str, str], list[Staged]] = {}
        for staged in self.waiting:
            by_key.setdefault((staged.bound.where, repr(staged.key)), []).append(staged)
        longest: dict[tuple[str, str], list[Any]] = {}
        for theirs in everyone:
            counted: dict[tuple[str, str], list[Any]] = {}
            for where, key, _, shape in theirs:
                counted.setdefault((where, key), []).append(shape)
            for k, shapes in counted.items():
                if len(shapes) > len(longest.get(k, [])):
                    longest[k] = shapes
        out: list[Staged] = []
        for place, shapes in longest.items():
            own = by_key.get(place, [])
            out += own
            for shape in shapes[len(own) :]:
                if not own:
                    raise DeliveryError(
                        f"{place[0]}: it ran on other ranks but never on rank {self.runtime.mesh.rank}."
                    )
                out.append(self._empty(own[0], shape))
        self.waiting = out

    def _empty(self, like: Staged, shape: tuple[int, ...]) -> Staged:
        layout = like.layout or self._settled(like)
        shape_list = list(shape)
        for i in layout.sharded_axes:
            if self.runtime.mesh.axes[i].kind == "data":
                shape_list[layout.placements[i].dim] = 0  # type: ignore[attr-defined]
        return Staged(like.bound, like.key, like.local.new_empty(shape_list), like.form, like.layout)

    def _settled(self, staged: Staged) -> Layout:
        if self.claims:
            claims, self.claims = self.claims, {}
            self.runtime.inference.settle(claims)
        assert staged.form is not None
        found = self.runtime.inference.known[staged.form]
        if isinstance(found, LayoutError):
            raise found
        return found
