"""``observe``: what passes every module in one forward: shapes, dtypes and layouts, and no value.

Hooks are delivered to as ``"shards"``: nothing moves but the numbers by which ranks find layouts, and sizes, which add
up along the axes that a value is sharded over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from flex_model.core.block import evaluating, hooks_on
from flex_model.core.bound import Bound
from flex_model.core.hook_function import HookFunction, HookType, Site
from flex_model.core.register import bind
from flex_model.layout.layout import Layout, shard_dim
from flex_model.routing.collectives import all_gather_objects, extremes
from flex_model.show.flow import Flow, joined, watch_flow
from flex_model.show.rows import ValueRow, words

if TYPE_CHECKING:
    from flex_model.core.flex_model import FlexModel
    from flex_model.core.runtime import Runtime

__all__ = ["Seen", "Values", "observe"]

Place = tuple[str, str]  # name of a module, side
Values = dict[Place, list[ValueRow]]
_SIDES: tuple[tuple[HookType, str], ...] = (("forward_pre", "in"), ("forward", "out"))


class _Notes:
    """A sink that keeps of each value what it looks like."""

    def __init__(self) -> None:
        self.seen: dict[Place, dict[int, ValueRow]] = {}
        self.layouts: dict[tuple[Place, int], Layout] = {}

    def meet(self, key: Any, local: Tensor, layout: Layout) -> None:
        place, index = _place(key)
        placed = words(layout.placements, layout.parted)
        row = ValueRow(place[1], index, None, tuple(local.shape), _dtype(local), placed, layout.evidence)
        self.layouts[place, index] = layout
        self._note(place, index, row)

    def part(self, key: Any, local: Tensor) -> None:
        """Rows of tokens at experts: as many as choose them, each rank its own."""
        place, index = _place(key)
        self._note(place, index, ValueRow(place[1], index, None, tuple(local.shape), _dtype(local), ("parts",)))

    def put(self, key: Any, value: Any) -> None:
        """A whole value, which stages of a pipeline send one another."""
        place, index = _place(key)
        if isinstance(value, Tensor):
            shape = tuple(value.shape)
            self._note(place, index, ValueRow(place[1], index, shape, shape, _dtype(value)))

    def refuse(self, key: Any, error: Exception) -> None:
        place, index = _place(key)
        self._note(place, index, ValueRow(place[1], index, None, (), "", refusal=str(error)))

    def empty(self, key: Any, reason: str) -> None:
        pass  # no tensors

    def _note(self, place: Place, index: int, row: ValueRow) -> None:
        rows = self.seen.setdefault(place, {})
        first = rows.get(index)
        rows[index] = row if first is None else replace(first, times=first.times + 1)


def _place(key: Site) -> tuple[Place, int]:
    return (key.name, "in" if key.hook_type == "forward_pre" else "out"), int(key.index)


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Seen:
    """``values``: of each side of a module; ``unfired``: {a module that did not run: why, if that can be told};
    ``flows``: inside the modules that call others."""

    values: Values
    unfired: dict[str, str]
    flows: dict[str, Flow]


def observe(
    fm: FlexModel, args: tuple[Any, ...], kwargs: dict[str, Any], forward: Callable[..., Any] | None = None
) -> Seen:
    """Every tensor of every module that ran, of all stages; the same on every rank. Collective.

    ``forward``: calls the model, such as a schedule's ``eval``. It is called twice, the second time for the flows, in
    eval mode without gradients; no value is kept.
    """
    runtime = fm._runtime
    runtime.look()
    notes = _Notes()
    bounds = _bounds(runtime, notes)
    run = forward or fm
    with _alone(runtime), torch.random.fork_rng(runtime.gpus), evaluating(fm.module):
        with hooks_on(runtime, bounds, [], {}, tell=False) as block:
            run(*args, **kwargs)
        with watch_flow(runtime.names.modules) as flows:
            run(*args, **kwargs)
    whole = _whole_shapes(runtime, bounds, notes)
    flat = {_place(b.key)[0] for b in bounds if b.apart and isinstance(b.key, Site)}
    values = {
        place: [_shaped(row, whole.get((place, i), row.shape), place in flat) for i, row in rows.items()]
        for place, rows in notes.seen.items()
    }
    unfired = {b.name: block.explain(b.key, False) for b in bounds if not b.fired and b.module is not None}
    return _of_all_stages(runtime, Seen(values, unfired, flows))


@contextmanager
def _alone(runtime: Runtime) -> Iterator[None]:
    """No hook of the user's fires, so that nothing is captured, edited or counted."""
    bounds, runtime.bounds = runtime.bounds, []
    try:
        yield
    finally:
        runtime.bounds = bounds
        runtime.installed.put_on()


def _bounds(runtime: Runtime, notes: _Notes) -> list[Bound]:
    names, bounds = runtime.names, []
    others = names.others("module")
    for name in names.everywhere():
        if names.never_fires(name) or name in others:
            continue
        for hook_type, _ in _SIDES:
            hook = HookFunction(name, unpack_idx="all")
            key = Site(name, hook_type, 0)
            bounds.append(bind(runtime, hook, hook_type, key, notes, "shards", temporary=True))
    return bounds


def _whole_shapes(runtime: Runtime, bounds: Sequence[Bound], notes: _Notes) -> dict[tuple[Place, int], tuple[int, ...]]:
    """Local sizes, added up along the axes of each value's shards. A rank that met no value adds nothing. Ranks that
    are not there add nothing either, and shapes are those that the layouts were found with."""
    mesh = runtime.mesh
    if mesh.axes and dist.get_backend() == "fake":
        return {spot: layout.shape for spot, layout in notes.layouts.items()}
    places = [_place(b.key)[0] for b in bounds if isinstance(b.key, Site)]
    most = torch.tensor([max(notes.seen.get(p, {-1: None})) + 1 for p in places] + [_dims(notes)], dtype=torch.long)
    if mesh.axes:
        most = extremes(most, mesh.control)[1]
    *counts, dims = most.tolist()
    spots = [(p, i) for p, count in zip(places, counts, strict=True) for i in range(count)]
    sizes = torch.zeros(len(spots), dims, dtype=torch.long)
    for row, (place, index) in enumerate(spots):
        seen = notes.seen.get(place, {}).get(index)
        if seen is not None and (place, index) in notes.layouts:
            sizes[row, : len(seen.local)] = torch.tensor(seen.local, dtype=torch.long)
    for axis in range(len(mesh.axes)):
        total = sizes.clone()
        dist.all_reduce(total, group=mesh.group(axis))
        for row, spot in enumerate(spots):
            layout = notes.layouts.get(spot)
            dim = None if layout is None or axis in layout.parted else shard_dim(layout.placements[axis])
            if dim is not None:
                sizes[row, dim] = total[row, dim]
    return {
        spot: tuple(sizes[row, : len(notes.seen[spot[0]][spot[1]].local)].tolist())
        for row, spot in enumerate(spots)
        if spot in notes.layouts
    }


def _shaped(row: ValueRow, whole: tuple[int, ...] | None, flat: bool) -> ValueRow:
    """``flat``: its first two dims are one where the model has it, and are taken apart only to find its layout."""
    if not flat or whole is None:
        return replace(row, shape=whole)
    shapes = [(a * b, *rest) for a, b, *rest in (whole, row.local)]
    return replace(row, shape=shapes[0], local=shapes[1])


def _dims(notes: _Notes) -> int:
    return max((len(row.local) for rows in notes.seen.values() for row in rows.values()), default=0)


def _of_all_stages(runtime: Runtime, mine: Seen) -> Seen:
    axis = runtime.whole.stage_axis
    if axis is None:
        return mine
    with runtime.watch.at("what stages have seen"):
        told: list[Seen] = all_gather_objects(mine, runtime.whole.group(axis))
    values: Values = {}
    for place, rows in (pair for seen in told for pair in seen.values.items()):
        if place not in values or not any(row.evidence for row in values[place]):  # by the stage that has the module
            values[place] = rows
    unfired = {name: why for seen in told for name, why in seen.unfired.items() if (name, "out") not in values}
    return Seen(values, unfired, joined([seen.flows for seen in told]))
