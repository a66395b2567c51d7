"""``Entry``: one tensor of a capture, or why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor

from flex_model.components.place import Place
from flex_model.core.captured import Captured, matching
from flex_model.core.hook_function import Site
from flex_model.core.naming.globs import Pattern
from flex_model.errors import DeliveryError, FlexModelError
from flex_model.layout.layout import replicates
from flex_model.layout.values import local
from flex_model.routing.assembly import Parts

__all__ = ["Entry", "Value", "chosen", "entries", "of_call"]


@dataclass(frozen=True, slots=True)
class Entry:
    """``call`` and ``part`` count from 0; ``part`` is None where the value is a whole. ``why``: there is no value."""

    key: str | Site
    call: int
    part: int | None
    value: Tensor | None
    why: str = ""

    @property
    def name(self) -> str:
        return self.key if isinstance(self.key, str) else ":".join(map(str, self.key))

    def __str__(self) -> str:
        """As ``Captured.save`` names it."""
        return self.name + (f"#{self.call}" if self.call else "") + ("" if self.part is None else f"@{self.part}")


@dataclass(frozen=True, slots=True)
class Value:
    """A site in one call: its whole, or its parts in rank order; none, and why."""

    parts: tuple[Tensor, ...]
    why: str = ""


def entries(acts: Captured, pattern: Pattern | Place, grad: bool) -> list[Entry]:
    """Of the names that match, in the model's order. Never collective."""
    table, what = (acts._grads, "gradient") if grad else (acts._values, "value")
    place = {key: i for i, key in enumerate(acts._keys)}
    others = [key for key in (*table.values, *acts.refused) if key not in place]
    told = {key.name for key in others if isinstance(key, Site)}
    keys = [key for key in acts._keys if key in table.values or key in acts.refused or key not in told] + others
    keys.sort(key=lambda key: place.get(key.name if isinstance(key, Site) and key not in place else key, len(place)))
    return [entry for key in matching(keys, pattern) for entry in _of_key(acts, key, grad, what)]


def _of_key(acts: Captured, key: str | Site, grad: bool, what: str) -> list[Entry]:
    try:
        calls = acts.grads(key) if grad else acts.calls(key)
    except FlexModelError as error:
        return [Entry(key, 0, None, None, " ".join(error.message.split()))]
    found = []
    for i, value in enumerate(calls):
        if isinstance(value, Parts):
            found += [Entry(key, i, p, part) for p, part in enumerate(value.tensors)]
        else:
            found.append(_of_whole(key, i, value, what))
    return found


def _of_whole(key: str | Site, call: int, value: Tensor, what: str) -> Entry:
    if not isinstance(value, DTensor):
        return Entry(key, call, None, value)
    if all(replicates(p) for p in value.placements):
        return Entry(key, call, None, local(value))
    placed = ", ".join(map(str, value.placements))
    why = (
        f"the {what} lies in shards ({placed}); capture with deliver='all' to see the whole, or compare shards with "
        f"flex_model.check.record"
    )
    return Entry(key, call, None, None, why)


def chosen(every: Sequence[Entry], pattern: Pattern | Place) -> list[Entry]:
    """Those whose names match."""
    keys = list(dict.fromkeys(e.key for e in every))
    wanted = set(matching(keys, pattern))
    return [e for e in every if e.key in wanted]


def of_call(every: Sequence[Entry], call: int | None) -> dict[str, Value]:
    """Of each name the value of one call, which must be named if there are several."""
    found: dict[str, Value] = {}
    for name in dict.fromkeys(e.name for e in every):
        mine = [e for e in every if e.name == name]
        count = mine[-1].call + 1
        if call is None and count > 1:
            raise DeliveryError(f"{name!r} has {count} calls; take one with call=0.", page="several-calls")
        if call is not None and not -count <= call < count:
            raise FlexModelError(
                f"call={call}: expected one of the {count} calls of {name!r}; take call=0.", page="bad-argument"
            )
        wanted = (call or 0) % count
        these = [e for e in mine if e.call == wanted]
        why = next((e.why for e in these if e.why), "")
        found[name] = Value(tuple(e.value for e in these if e.value is not None), why)
    return found
