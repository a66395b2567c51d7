"""Points at which ranks hold different values: they ran different numbers of forwards, or not the same modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flex_model.core.call import Staged
from flex_model.core.ragged import stand_ins, stub_of
from flex_model.errors import LayoutError
from flex_model.layout.layout import Layout, shard_dim
from flex_model.layout.mesh import ModelMesh
from flex_model.routing.collectives import all_gather_objects

if TYPE_CHECKING:
    from flex_model.core.runtime import Runtime

__all__ = ["align", "without_rows"]


def align(runtime: Runtime, staged: list[Staged], forwards: int) -> list[Staged]:
    """Everybody's values in one order. Collective.

    A rank that did not run the k-th forward stands in with no rows. A module that ran in it on some ranks and not
    on others has no whole value, and is refused by name, unless its rows are parts: then who ran none has none.
    """
    places = [(s.bound.where, repr(s.key), s.forward) for s in staged]
    shapes = {place: stub_of(s, runtime) for place, s in zip(places, staged, strict=True)}
    everyone = all_gather_objects((forwards, places, shapes), runtime.mesh.world)
    order = dict.fromkeys(p for _, theirs, _ in everyone for p in theirs)
    stubs = {p: next(known[p] for _, _, known in everyone if p in known) for p in order}
    broken = {p[:2] for p in order if not (stubs[p].parted or _runs_together(p, everyone))}
    kept = {p: [s for place, s in zip(places, staged, strict=True) if place == p] for p in order}
    like = {p[:2]: s for p, s in zip(places, staged, strict=True)}
    aligned: list[Staged] = []
    for where, key in broken:
        times_by_rank = [sum(p[:2] == (where, key) for p in theirs) for _, theirs, _ in everyone]
        _refuse_place(runtime, where, key, times_by_rank)
    for place in sorted(order, key=lambda p: p[2]):
        if place[:2] in broken:
            continue
        times = max(theirs.count(place) for _, theirs, _ in everyone)
        if kept[place]:
            aligned += kept[place]
        elif stubs[place].parted:
            aligned += stand_ins(runtime, place, stubs[place])
        else:
            aligned += [_empty(runtime, like[place[:2]], stubs[place].shape) for _ in range(times)]
    return aligned


def _refuse_place(runtime: Runtime, where: str, key: str, times: Sequence[int]) -> None:
    by_rank = dict(zip(runtime.mesh.ranks[:8], times, strict=False))
    error = LayoutError(
        f"{where}: the full value is unknown: it ran on some ranks and not on others (calls by rank: {by_rank}); "
        f"hook a module that all ranks run.",
        page="ran-on-some-ranks",
    )
    for bound in runtime.bounds:
        if bound.where == where:
            runtime.outbox.refused += [(bound, k, error) for k in (bound.key, bound.site(0)) if repr(k) == key][:1]


def _empty(runtime: Runtime, like: Staged, shape: tuple[int, ...]) -> Staged:
    """The part of a rank that did not run a forward: no rows."""
    assert like.layout is not None or like.form is not None
    found = like.layout if like.layout is not None else runtime.inference.known[like.form]  # type: ignore[index]
    sizes = without_rows(shape, found, runtime.mesh) if isinstance(found, Layout) else shape
    return Staged(like.bound, like.key, like.local.new_empty(sizes), like.form, like.layout)


def without_rows(shape: tuple[int, ...], layout: Layout, mesh: ModelMesh) -> tuple[int, ...]:
    """The shape of a part that has nothing of the batch."""
    sizes = list(shape)
    for i in layout.sharded_axes:
        if mesh.axes[i].kind == "data":
            sizes[shard_dim(layout.placements[i]) or 0] = 0
    return tuple(sizes)


def _runs_together(place: tuple[str, str, int], everyone: Sequence[tuple[int, list[Any], Any]]) -> bool:
    """Whether all ranks that ran a forward passed a place equally often in it, and every rank has passed it at all."""
    times = {theirs.count(place) for forwards, theirs, _ in everyone if forwards > place[2]}
    return len(times) == 1 and all(any(p[:2] == place[:2] for p in theirs) for _, theirs, _ in everyone)
