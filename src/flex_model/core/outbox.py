"""``Outbox``: what a model has captured and not delivered yet, and the points where it goes out.

Delivery is collective, so it happens only where every rank passes: the end of a forward in lockstep, the end of a
backward, ``flush``. At such a point claims are settled, failures told to everybody, and values moved.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flex_model.core import flattened
from flex_model.core.agreeing.status import ON_SHARDS, Status, told_to_all
from flex_model.core.agreeing.uneven import align, without_rows
from flex_model.core.bound import Bound, Sink, check_expected
from flex_model.core.call import Staged
from flex_model.core.inference import Form
from flex_model.core.ragged import Identity, give, refusal, unnamed
from flex_model.errors import FlexModelError, LayoutError
from flex_model.layout.claim import Claim
from flex_model.layout.layout import Layout
from flex_model.routing.delivery import deliver
from flex_model.routing.hop import Hop, Parcel
from flex_model.routing.item import Item
from flex_model.routing.route import gradient_scale
from flex_model.routing.selection import Taken
from flex_model.trees import copy_tree

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
        self.refused: list[Refused] = []
        self.forwards = 0  # since the last point
        self.owed = False  # some rank may hold what others do not: hooks were on since then that concern them
        self.status = Status(runtime, self.drop)
        self._hops: Hop | None = None

    def point(self, *, edited: bool = False) -> None:
        """All ranks are here: settle what was claimed, tell of failures, deliver what waits. Collective."""
        runtime = self.runtime
        if runtime.whole.axes:
            runtime.agree()
            with runtime.watch.telling(), runtime.watch.at("the end of the forward"), told_to_all():
                self._point_of_stages() if runtime.whole is not runtime.mesh else self._point(edited)

    def _point(self, edited: bool) -> None:
        mesh = self.runtime.mesh
        data = self.owed and any(a.kind == "data" for a in mesh.axes)
        self.owed = self.runtime.installed.concern_others
        first = new = bool(self.claims)
        # On tensor axes alone all ranks run the same code on the same data, so that they ask alike without asking.
        uneven = self.runtime.installed.uneven
        if edited or data or uneven or any(_moves(s) for s in self.waiting):
            rows = self.status.exchange([(s.bound.where, s.key) for s in self.waiting], len(self.claims))
            first = new = any(claims for _, claims, _ in rows)
            if (data or uneven) and len({(count, mark) for count, _, mark in rows}) > 1:
                self._settle(new)
                new = False
                self.waiting = align(self.runtime, self.waiting, self.forwards)
            else:
                self.status.same_on_all(rows)
        self._settle(new)
        items, refused = self._items()
        self._tell_of_selections(first)
        self.deliver(items)
        self.raise_refused(refused)

    def _items(self) -> tuple[list[Item], list[Refused]]:
        staged, self.waiting, self.forwards = self.waiting, [], 0
        refused, self.refused = self.refused, []
        return [i for s in staged if (i := self.item(s, refused)) is not None], refused

    def _tell_of_selections(self, first: bool) -> None:
        """Selections from shards were made just now, for the first time or from a step's microbatches: did any fail?"""
        if first and any(b.selection is not None for b in self.runtime.bounds if b.enabled):
            self.status.exchange([])

    def _point_of_stages(self) -> None:
        """``point`` of a pipeline: each stage delivers to its own ranks, then the stages to one another."""
        mesh = self.runtime.mesh
        rows = self.status.exchange([(s.bound.where, s.key) for s in self.waiting], len(self.claims))
        new = any(claims for _, claims, _ in rows)
        if mesh.axes and len({(count, mark) for count, _, mark in rows}) > 1:
            self._settle(new)
            new = False
            self.waiting = align(self.runtime, self.waiting, self.forwards)
        self._settle(new)
        items, refused = self._items()
        self._tell_of_selections(True)
        parcels = self._parcels(items, refused)
        bounds = self.runtime.bounds

        def put(label: tuple[Any, ...], value: Any) -> None:
            bound, key, gradient = bounds[label[0]], label[1], label[2]
            if isinstance(value, LayoutError):
                refused_everywhere.append((bound, key, value))
            elif isinstance(value, Exception):
                problems.append(value)
            else:
                arrived.append((self._sink(bound, gradient), key, value))

        arrived: list[tuple[Sink, Any, Any]] = []
        refused_everywhere: list[Refused] = []
        problems: list[Exception] = []
        self.hop.exchange(parcels, self.runtime.device_of_values, put)
        arrived = [(sink, key, copy_tree(value, self._keep)) for sink, key, value in arrived]
        self.runtime.copies.wait()
        for sink, key, value in arrived:
            sink.put(key, value)
        for problem in problems:
            raise problem
        self.raise_refused(refused_everywhere)

    def _parcels(self, items: list[Item], refused: list[Refused]) -> list[Parcel]:
        """What this rank has for other stages, once its own stage has delivered."""
        index = {id(b): i for i, b in enumerate(self.runtime.bounds)}
        parcels = [Parcel((index[id(b)], key, False), "all", error) for b, key, error in refused]
        try:
            here: list[tuple[Item, Any]] = []
            for item in items:
                item.put = lambda value, item=item: here.append((item, value))  # type: ignore[misc]
            self.deliver(items, keep=lambda value: value)  # on they go
        except FlexModelError as error:  # all ranks of the stage have it
            return [*parcels, Parcel((0, None, False), "all", error)]
        for item, value in here:
            bound, key, gradient = item.label
            if item.mode == "shards":
                self.hand_over(bound, key, value, item.layout)
            elif item.mode == "local":
                self._sink(bound, gradient).put(key, value)
            else:
                parcels.append(Parcel((index[id(bound)], key, gradient), item.mode, unnamed(value)))
        return parcels

    def _keep(self, value: Tensor) -> Tensor:
        return self.runtime.copies.bring(value, self.runtime.device)

    @staticmethod
    def _sink(bound: Bound, gradient: bool) -> Sink:
        sink = bound.gradient_sink if gradient and not bound.is_gradient else bound.sink
        assert sink is not None
        return sink

    @property
    def hop(self) -> Hop:
        whole = self.runtime.whole
        if self._hops is None or self._hops.mesh is not whole:
            self._hops = Hop(whole)
        return self._hops

    def _settle(self, new: bool) -> None:
        claims, self.claims = self.claims, {}
        if new:
            self.runtime.inference.settle(claims)

    def drop(self) -> None:
        """Nothing of this call goes out: it has failed."""
        self.waiting, self.claims, self.refused, self.forwards = [], {}, [], 0

    def discard(self, bounds: list[Bound]) -> None:
        """Forget what these hooks have staged: their block has ended with an exception."""
        self.waiting = [s for s in self.waiting if not any(s.bound is b for b in bounds)]

    def item(self, staged: Staged, refused: list[tuple[Bound, Any, LayoutError]]) -> Item | None:
        bound, layout = staged.bound, staged.layout
        found = None if staged.form is None else self.runtime.inference.known.get(staged.form)
        if isinstance(found, LayoutError):
            refused.append((bound, staged.key, found))
            return None
        if layout is None:
            assert found is not None
            layout = found
        local, finish, room = staged.local, staged.finish, staged.room
        if staged.idle:
            local, room = local.new_empty(without_rows(local.shape, layout, self.runtime.mesh)), None
        if bound.selection is not None and not staged.selected:
            if (error := refusal(self.runtime, bound, local, layout)) is not None:
                refused.append((bound, staged.key, error))
                return None
            try:
                taken = self.select_on_shards(bound, local, layout)
            except Exception as problem:
                self.status.note("select", bound.where, problem)
                return None
            if taken is not None:
                (local, layout, finish), room = taken, None
            else:
                finish = bound.selection.take
        if finish is not None and bound.deliver == "local":
            refused.append((bound, staged.key, _cannot_stay(bound)))
            return None
        sink = self._sink(bound, staged.gradient)
        scale = (
            gradient_scale(self.runtime.mesh, layout, range(len(self.runtime.mesh.axes))) if staged.gradient else 1.0
        )
        key = staged.key

        check: Callable[[tuple[int, ...]], str] | None = (
            None if bound.selection is not None else partial(check_expected, bound)
        )
        if bound.apart:
            finish, check = flattened.finish(finish), flattened.check(check)

        def put(full: Any) -> None:
            if bound.deliver == "shards":
                self.hand_over(bound, key, full, layout)
            else:
                give(sink, key, full)

        label = (bound, key, staged.gradient)
        item = Item(bound.where, local, layout, bound.deliver, put, room, scale, finish, check, label)
        if staged.rows or layout.parted:
            item.beside = Identity(staged, layout, self.runtime.mesh)
        return item

    def hand_over(self, bound: Bound, key: Any, local: Tensor, layout: Layout | None, *, rows: bool = False) -> None:
        """This rank's shard to a sink of shards. ``rows``: its rows are tokens at experts, which only a sink with the
        method ``part`` takes."""
        sink: Any = bound.sink
        try:
            if rows or layout is None or layout.parted:
                if (part := getattr(sink, "part", None)) is not None:
                    part(key, local)
                    return
                raise LayoutError(
                    f"{bound.where}: its rows are tokens at experts, in another order than the data's; take what the "
                    f"layer of experts puts out, or fm.capture and acts.rows().",
                    page="rows-are-parts",
                )
            sink.meet(key, local, layout)
        except Exception as error:
            if not self.runtime.whole.axes:
                raise
            self.status.note("taking its shard", bound.where, error)

    def select_on_shards(self, bound: Bound, local: Tensor, layout: Layout) -> Taken | None:
        """The selection of this rank's shard and its layout; None if it can only be made from the whole."""
        assert bound.selection is not None
        if bound.apart:
            return None
        taken = bound.selection.of_shard(local, layout, self.runtime.mesh)
        self.status.selections[bound.where] = bound.selection.failure if taken is None else ON_SHARDS
        return taken

    def deliver(self, items: list[Item], keep: Callable[[Tensor], Tensor] | None = None) -> None:
        if not items:
            return
        copies = self.runtime.copies
        copies.wait()  # what is finished here is read
        with torch.inference_mode(False):
            failed = deliver(items, self.runtime.mesh, self.runtime.memory, keep or self._keep, copies.wait)
        refused: list[Refused] = []
        for item, error in failed:
            if isinstance(error, LayoutError):  # on every rank
                bound, key, _ = item.label
                refused.append((bound, key, error))
            else:  # others have theirs, and learn of it at the next point
                self.status.note("the delivery", item.where, error)
        self.raise_refused(refused)

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
        self.point(edited=True)


def _cannot_stay(bound: Bound) -> LayoutError:
    return LayoutError(
        f"{bound.where}: select= takes part of a dim that is sharded, so ranks have no shards of the selection; "
        f"deliver='all' or 'main' makes it from the whole value."
    )


def _moves(staged: Staged) -> bool:
    return staged.layout is None or (
        bool(staged.layout.moving_axes) and staged.bound.deliver not in ("local", "shards")
    )
