"""``Item``: one value on its way from where it was met to where it is wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from torch import Tensor

from flex_model.layout.layout import Layout, shard_dim
from flex_model.layout.mesh import ModelMesh
from flex_model.routing.assembly import Parts, Shapes, size_below

__all__ = ["Deliver", "Item", "each", "full_shape"]

Deliver = Literal["main", "all", "local", "shards"]  # shards: to a sink of shards, which takes them as they are


class Beside(Protocol):
    """What identifies a value's rows, on its way beside the value."""

    item: Item

    def join(self, value: Tensor | Parts) -> Any:
        """The value with what it is."""


@dataclass(slots=True)
class Item:
    """One value on its way. ``put`` receives the full tensor (or Parts) on the ranks it is delivered to."""

    where: str
    local: Tensor
    layout: Layout
    mode: Deliver
    put: Callable[[Any], None]
    room: Tensor | None = None  # the full tensor, of which ``local`` is this rank's place
    scale: float = 1.0  # the full value is divided by this: gradients that an engine means over data axes
    finish: Callable[[Tensor], Tensor] | None = None  # what is left of a selection once the value is whole
    check: Callable[[tuple[int, ...]], str] | None = None  # what is wrong with the full shape
    label: Any = None  # what it is, for whoever passes it on
    beside: Beside | None = None  # what identifies its rows, and travels with it
    shapes: Shapes | None = None
    full: Tensor | Parts | None = None  # here, once it has arrived
    failure: Exception | None = None  # why it could not be finished or put away on this rank

    def complete(self, full: Tensor | Parts) -> None:
        """Runs between collectives, so that a failure must wait."""
        try:
            self.full = each(full, self._completed)
        except Exception as error:
            self.failure = error

    def _completed(self, full: Tensor) -> Tensor:
        full = full / self.scale if self.scale != 1 else full
        return self.finish(full) if self.finish is not None else full


def each(full: Tensor | Parts, fn: Callable[[Tensor], Tensor]) -> Tensor | Parts:
    return replace(full, tensors=tuple(map(fn, full.tensors))) if isinstance(full, Parts) else fn(full)


def full_shape(item: Item, mesh: ModelMesh) -> tuple[int, ...]:
    shape = list(item.local.shape)
    for axis, placement in enumerate(item.layout.placements) if item.shapes is not None else ():
        dim = shard_dim(placement)
        if dim is not None and item.shapes is not None:
            shape[dim] = (
                shape[dim] * mesh.axes[axis].size
                if item.shapes.even
                else size_below(item.layout, mesh, item.shapes, (), dim)
            )
    return tuple(shape)
