"""Values whose rows are tokens at experts: from firing to delivery, where each rank has as many as it happens to have.

A module inside a mixture of experts may fire once for all experts or once an expert, and not at all on a rank whose
experts got no token. What fired in one forward of the mixture travels as one value, and who has none stands in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from flex_model.core.bound import Bound, Sink
from flex_model.core.call import ActiveCall, Staged
from flex_model.core.inference import Form
from flex_model.errors import LayoutError
from flex_model.layout.layout import Layout, shard_dim
from flex_model.layout.mesh import ModelMesh
from flex_model.routing.assembly import Parts
from flex_model.routing.item import Item
from flex_model.routing.route import Route
from flex_model.routing.rows import Gathered, Ids, encode, parted_axes, resolve

if TYPE_CHECKING:
    from flex_model.core.runtime import Runtime

__all__ = [
    "Identified",
    "Identity",
    "gathered",
    "give",
    "identified",
    "merge",
    "parted",
    "refusal",
    "stand_ins",
    "stub_of",
    "unnamed",
    "whole_experts",
]


def gathered(bound: Bound, value: Tensor, call: ActiveCall) -> Gathered | None:
    """Which tokens at which experts the value's rows are right now, where an engine knows; not in a pipeline, whose
    microbatches are put together by their batch dim."""
    return None if bound.source is None or call.place is not None else bound.source.rows(value)


def parted(runtime: Runtime, bound: Bound, rows: Gathered | None) -> tuple[int, ...]:
    """The axes along which these rows are a rank's own."""
    if rows is None or rows.ordered or bound.source is None:
        return ()
    return parted_axes(runtime.mesh, bound.source)


def refusal(runtime: Runtime, bound: Bound, local: Tensor, layout: Layout) -> LayoutError | None:
    """Why a hook cannot have rows that are parts, if it cannot."""
    if not layout.parted:
        return None
    why = ""
    if bound.attached:
        why = "detach=False hands out whole values"
    elif bound.edit is not None and bound.hook.run != "every_rank":
        why = f"run={bound.hook.run!r} needs a whole value; run='every_rank' gives each rank its own rows"
    elif bound.selection is not None and not _leaves_rows(runtime, bound, local, layout):
        why = "select= must leave all rows, they have no common order; take acts.rows(name) and select from that"
    return (
        LayoutError(
            f"{bound.where}: its rows are tokens at experts, a part for each rank: {why}.", page="rows-are-parts"
        )
        if why
        else None
    )


def _leaves_rows(runtime: Runtime, bound: Bound, local: Tensor, layout: Layout) -> bool:
    taken = runtime.outbox.select_on_shards(bound, local, layout)
    return taken is not None and all(shard_dim(taken[1].placements[i]) == 0 for i in layout.parted)


def whole_experts(runtime: Runtime, layout: Layout, rows: Gathered | None) -> Tensor | None:
    """The expert of each row that an edit is given: its own part's, or those of the whole value."""
    if rows is None or layout.parted:
        return None if rows is None else rows.experts
    own = tuple(Shard(0) if shard_dim(p) == 0 else Replicate() for p in layout.placements)
    return Route(runtime.mesh, replace(layout, placements=own), rows.experts).unshard(rows.experts)


def merge(staged: Sequence[Staged], mesh: ModelMesh) -> list[Staged]:
    """What one hook met in one forward of a mixture as one value, where ranks hold parts; in the order of firing."""
    out: list[Staged] = []
    open_: dict[tuple[Any, ...], list[Staged]] = {}
    for one in staged:
        if not one.rows or not mesh.axes or one.rows[0].ordered:
            out.append(one)
            continue
        key = (id(one.bound), one.key, id(one.rows[0].origin), one.gradient)
        if key not in open_:
            out.append(one)
        open_.setdefault(key, []).append(one)
    merged = {id(group[0]): _joined(group) for group in open_.values() if len(group) > 1}
    return [merged.get(id(one), one) for one in out]


def _joined(group: list[Staged]) -> Staged:
    group = sorted(group, key=lambda s: s.rows[0].index)
    rows = tuple(r for s in group for r in s.rows)
    return replace(group[0], local=torch.cat([s.local for s in group]), rows=rows)


@dataclass(frozen=True, slots=True)
class Stub:
    """What a rank must know of a value to stand in for it without rows."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    form: Form | None = None
    layout: Layout | None = None
    gradient: bool = False

    @property
    def parted(self) -> bool:
        return self.layout is not None and bool(self.layout.parted)


def stub_of(staged: Staged, runtime: Runtime) -> Stub:
    known = runtime.inference.known.get(staged.form) if staged.form is not None else None
    layout = staged.layout or (known if isinstance(known, Layout) else None)
    return Stub(tuple(staged.local.shape), staged.local.dtype, staged.form, layout, staged.gradient)


def stand_ins(runtime: Runtime, place: tuple[str, str, int], stub: Stub) -> list[Staged]:
    """No rows, for every hook at a place that others have met and this rank has not."""
    where, key, forward = place
    empty = torch.empty((0, *stub.shape[1:]), dtype=stub.dtype, device=runtime.device_of_values)
    out = []
    for bound in runtime.bounds:
        sink = bound.gradient_sink if stub.gradient and not bound.is_gradient else bound.sink
        if bound.enabled and bound.where == where and sink is not None:
            keys = [k for k in dict.fromkeys((bound.key, *map(bound.site, range(8)))) if repr(k) == key]
            out += [
                Staged(bound, k, empty, stub.form, stub.layout, stub.gradient, forward, selected=True) for k in keys
            ]
    return out


@dataclass(frozen=True, eq=False, slots=True)
class Identified:
    """A whole value, or its parts, on the way into a sink, with the token and the expert of all its rows in order."""

    value: Tensor | Parts
    tokens: Tensor
    experts: Tensor
    serial: int  # of the mixture's forward


def identified(value: Tensor, rows: Gathered) -> Identified:
    """A value that is whole on this rank."""
    tokens, experts = (ids.detach().to("cpu", copy=True) for ids in (rows.tokens, rows.experts))
    return Identified(value, tokens, experts, rows.origin.serial)


class Identity:
    """The tokens and experts of one value's rows on their way beside it: ``item`` brings them, ``join`` adds them."""

    def __init__(self, staged: Staged, layout: Layout, mesh: ModelMesh) -> None:
        self.mesh, self.parted = mesh, layout.parted
        self.serial = staged.rows[0].origin.serial if staged.rows else -1
        self.ids: list[Ids] = []
        bound = staged.bound
        own: list[Placement] = [Shard(0) if shard_dim(p) == 0 else Replicate() for p in layout.placements]
        axes = tuple(i for i, p in enumerate(own) if shard_dim(p) == 0)
        lay = Layout(tuple(own), "rows", ragged=tuple(i in axes for i in range(len(own))), parted=axes)
        line = encode(staged.rows, staged.local.device)
        mode = "all" if bound.deliver == "local" else bound.deliver
        self.item = Item(bound.where, line, lay, mode, self._arrived)

    def _arrived(self, lines: Tensor | Parts) -> None:
        if isinstance(lines, Parts):
            self.ids = resolve(lines.tensors, lines.coordinates, self.mesh)
            self._places = lines.coordinates
        else:
            self.ids = resolve([lines], [{}], self.mesh)
            self._places = ({},)

    def join(self, value: Tensor | Parts) -> Identified:
        """The value with what it is, and the same of all its rows in one."""
        ids = self.ids
        if isinstance(value, Parts):
            at = [self._places.index({n: c[n] for n in self._places[0]}) for c in value.coordinates]
            ids = [ids[i] for i in at]
            value = replace(value, tokens=tuple(t for t, _ in ids), experts=tuple(e for _, e in ids))
        return Identified(value, torch.cat([t for t, _ in ids]), torch.cat([e for _, e in ids]), self.serial)


def give(sink: Sink, key: Any, value: Any, kept: Callable[[Any], Any] = lambda value: value) -> None:
    """Put a value into a sink, and what its rows are if the sink keeps that."""
    keep = getattr(sink, "put_rows", None)
    if isinstance(value, Identified) and keep is not None:
        keep(key, kept(value.value), value.tokens, value.experts, value.serial)
    else:
        sink.put(key, kept(unnamed(value)))


def unnamed(value: Any) -> Any:
    return value.value if isinstance(value, Identified) else value
