"""``Outbox``: what a model has captured and not delivered yet, and the points where it goes out.

Delivery is collective, so it happens only where every rank passes: the end of a forward in lockstep, the end of a
backward, ``flush``. At such a point claims are settled, failures told to everybody, and values moved.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from torch import Tensor

from flex_model.core import flattened
from flex_model.core.bound import Bound, Sink, check_expected
from flex_model.core.call import Staged
from flex_model.core.hook_function import Call
from flex_model.core.inference import Form
from flex_model.core.ragged import Identity, give, refusal, stand_ins, stub_of, unnamed
from flex_model.errors import DeliveryError, EditError, FlexModelError, LayoutError
from flex_model.layout.claim import Claim
from flex_model.layout.layout import Layout, shard_dim
from flex_model.routing.collectives import all_gather_ints, all_gather_objects, extremes
from flex_model.routing.delivery import Buffers, Item, deliver
from flex_model.routing.hop import Hop, Parcel
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
        self.forwards = 0  # since the last point
        self._buffers = Buffers()
        self._hops: Hop | None = None

    def point(self, *, edited: bool = False) -> None:
        """All ranks are here: settle what was claimed, tell of failures, deliver what waits. Collective."""
        mesh = self.runtime.mesh
        if self.runtime.whole is not mesh:
            self._point_of_stages()
            return
        if not mesh.axes:
            return
        data = any(a.kind == "data" for a in mesh.axes)
        new = bool(self.claims)
        # On tensor axes alone all ranks run the same code on the same data, so that they ask alike without asking.
        uneven = self.runtime.uneven
        if edited or data or uneven or any(_moves(s) for s in self.waiting):
            rows = self.status([(s.bound.where, s.key) for s in self.waiting], len(self.claims))
            new = any(claims for _, claims, _ in rows)
            if (data or uneven) and len({(count, mark) for count, _, mark in rows}) > 1:
                self._settle(new)
                new = False
                self.waiting = self.align(self.waiting, self.forwards)
            else:
                self.same_on_all(rows)
        self._settle(new)
        items, refused = self._items()
        self.deliver(items)
        self.raise_refused(refused)

    def _items(self) -> tuple[list[Item], list[Refused]]:
        staged, self.waiting, self.forwards = self.waiting, [], 0
        refused, self.refused = self.refused, []
        return [i for s in staged if (i := self.item(s, refused)) is not None], refused

    def _point_of_stages(self) -> None:
        """``point`` of a pipeline: each stage delivers to its own ranks, then the stages to one another."""
        mesh = self.runtime.mesh
        rows = self.status([(s.bound.where, s.key) for s in self.waiting], len(self.claims))
        new = any(claims for _, claims, _ in rows)
        if mesh.axes and len({(count, mark) for count, _, mark in rows}) > 1:
            self._settle(new)
            new = False
            self.waiting = self.align(self.waiting, self.forwards)
        self._settle(new)
        items, refused = self._items()
        parcels = self._parcels(items, refused)
        bounds = self.runtime.bounds

        def put(label: tuple[Any, ...], value: Any) -> None:
            bound, key, gradient = bounds[label[0]], label[1], label[2]
            if isinstance(value, LayoutError):
                refused_everywhere.append((bound, key, value))
            elif isinstance(value, Exception):
                problems.append(value)
            else:
                self._sink(bound, gradient).put(key, self._kept(value))

        refused_everywhere: list[Refused] = []
        problems: list[Exception] = []
        self.hop.exchange(parcels, self.runtime.device_of_values, put)
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
            self.deliver(items)
        except FlexModelError as error:  # all ranks of the stage have it
            return [*parcels, Parcel((0, None, False), "all", error)]
        for item, value in here:
            bound, key, gradient = item.label
            if item.mode == "local":
                self._sink(bound, gradient).put(key, value)
            else:
                parcels.append(Parcel((index[id(bound)], key, gradient), item.mode, unnamed(value)))
        return parcels

    def _kept(self, value: Any) -> Any:
        device = self.runtime.device
        return value if not isinstance(value, Tensor) or device is None else value.to(device)

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
        local, finish = staged.local, None
        if bound.selection is not None and not staged.selected:
            if (error := refusal(self.runtime, bound, local, layout)) is not None:
                refused.append((bound, staged.key, error))
                return None
            taken = self.select_on_shards(bound, local, layout)
            if taken is not None:
                local, layout = taken
            else:
                finish = bound.selection.take
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
            give(sink, key, full, self._kept)

        label = (bound, key, staged.gradient)
        item = Item(bound.where, local, layout, bound.deliver, put, scale, finish, check, label)
        if staged.rows or layout.parted:
            item.beside = Identity(staged, layout, self.runtime.mesh)
        return item

    def select_on_shards(self, bound: Bound, local: Tensor, layout: Layout) -> tuple[Tensor, Layout] | None:
        """The selection of this rank's shard and its layout; None if it can only be made from the whole."""
        assert bound.selection is not None
        if bound.apart:
            return None
        sizes = {i: a.size for i, a in enumerate(self.runtime.mesh.axes)}
        new = bound.selection.on_shards(layout, tuple(local.shape), sizes)
        return None if new is None else (bound.selection.take(local), new)

    def deliver(self, items: list[Item]) -> None:
        self.runtime.wait_for_copies()
        with torch.inference_mode(False):
            deliver(items, self.runtime.mesh, self._buffers)

    def status(self, places: Sequence[tuple[str, Any]], claims: int = 0) -> list[tuple[int, int, int]]:
        """One small exchange: did an edit fail? Else (number of values, new claims, mark of places) of every rank of
        this stage, once where they agree."""
        mark = crc32(repr(places).encode())
        mesh, whole = self.runtime.mesh, self.runtime.whole
        row = [len(self.failures), len(places), claims, mark]
        low, high = extremes(torch.tensor(row), whole.world, self.runtime.device_of_values)
        if high[0]:
            everyone = all_gather_objects(self.failures, whole.world)
            self.failures, self.waiting, self.claims, self.forwards = [], [], {}, 0
            first = next(f for theirs in everyone for f in theirs)
            raise EditError(
                f"{first['where']}: the editing function failed on rank {first['rank']} in call {first['call']} with "
                f"{first['error']}; caches, buffers and gradients of this call are undefined.\n{first['traceback']}"
            )
        if mesh is not whole and mesh.axes and not torch.equal(low, high):  # other stages hold other modules
            low, high = extremes(torch.tensor(row), mesh.world, self.runtime.device_of_values)
        if not mesh.axes or torch.equal(low, high):
            return [(len(places), claims, mark)]
        return [(r[0], r[1], r[2]) for r in all_gather_ints(row[1:], mesh.world, self.runtime.device_of_values)]

    def same_on_all(self, rows: Sequence[tuple[int, int, int]]) -> None:
        if len({(count, mark) for count, _, mark in rows}) > 1:
            counts = dict(zip(self.runtime.mesh.ranks, [r[0] for r in rows], strict=True))
            raise DeliveryError(
                f"ranks captured different values in this call (values by rank: {counts}); every rank must register "
                f"the same hooks in the same order and run the same modules."
            )

    def note_failure(self, bound: Bound, call: Call, error: BaseException) -> None:
        lines = "".join(traceback.format_exception(error))
        self.failures.append(
            {
                "where": bound.where,
                "rank": self.runtime.whole.rank,
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
        self.point(edited=bool(self.failures) or not self.runtime.lockstep)

    def align(self, staged: list[Staged], forwards: int) -> list[Staged]:
        """Ranks hold different values: they ran different numbers of forwards, or a module ran on some ranks only.

        A rank that did not run the k-th forward stands in with no rows. A module that ran in it on some ranks and not
        on others has no whole value, and is refused by name, unless its rows are parts: then who ran none has none.
        """
        places = [(s.bound.where, repr(s.key), s.forward) for s in staged]
        shapes = {place: stub_of(s, self.runtime) for place, s in zip(places, staged, strict=True)}
        everyone = all_gather_objects((forwards, places, shapes), self.runtime.mesh.world)
        order = dict.fromkeys(p for _, theirs, _ in everyone for p in theirs)
        stubs = {p: next(known[p] for _, _, known in everyone if p in known) for p in order}
        broken = {p[:2] for p in order if not (stubs[p].parted or _runs_together(p, everyone))}
        kept = {p: [s for place, s in zip(places, staged, strict=True) if place == p] for p in order}
        like = {p[:2]: s for p, s in zip(places, staged, strict=True)}
        aligned: list[Staged] = []
        for where, key in broken:
            self._refuse_place(where, key)
        for place in sorted(order, key=lambda p: p[2]):
            if place[:2] in broken:
                continue
            times = max(theirs.count(place) for _, theirs, _ in everyone)
            if kept[place]:
                aligned += kept[place]
            elif stubs[place].parted:
                aligned += stand_ins(self.runtime, place, stubs[place])
            else:
                aligned += [self._empty(like[place[:2]], stubs[place].shape) for _ in range(times)]
        return aligned

    def _refuse_place(self, where: str, key: str) -> None:
        error = LayoutError(f"{where}: the full value is unknown: it ran on some ranks and not on others.")
        for bound in self.runtime.bounds:
            if bound.where == where:
                self.refused += [(bound, k, error) for k in (bound.key, bound.site(0)) if repr(k) == key][:1]

    def _empty(self, like: Staged, shape: tuple[int, ...]) -> Staged:
        """The part of a rank that did not run a forward: no rows."""
        assert like.layout is not None or like.form is not None
        found = like.layout if like.layout is not None else self.runtime.inference.known[like.form]  # type: ignore[index]
        sizes = list(shape)
        for i in found.sharded_axes if isinstance(found, Layout) else ():
            if self.runtime.mesh.axes[i].kind == "data":
                sizes[shard_dim(found.placements[i]) or 0] = 0  # type: ignore[union-attr]
        return Staged(like.bound, like.key, like.local.new_empty(sizes), like.form, like.layout)


def _moves(staged: Staged) -> bool:
    return staged.layout is None or (bool(staged.layout.moving_axes) and staged.bound.deliver != "local")


def _runs_together(place: tuple[str, str, int], everyone: Sequence[tuple[int, list[Any], Any]]) -> bool:
    """Whether all ranks that ran a forward passed a place equally often in it, and every rank has passed it at all."""
    times = {theirs.count(place) for forwards, theirs, _ in everyone if forwards > place[2]}
    return len(times) == 1 and all(any(p[:2] == place[:2] for p in theirs) for _, theirs, _ in everyone)
