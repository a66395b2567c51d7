"""``Slot``: a hook of torch's that can be put on a module and taken off again at the cost of a dict's entry; and
``Set``: what some hooks of ours put on the model, kept so that a group which is switched off and on is not made anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from flex_model.core.bound import Bound

__all__ = ["Set", "Sets", "Slot"]

_KEPT = 8  # sets


class Slot:
    """It is on from when it is made. ``register`` is torch's function that puts it on."""

    def __init__(self, module: nn.Module, table: str, register: Callable[..., Any], hook: Any, **options: Any) -> None:
        handle = register(hook, **options)
        self._module, self._table, self._id = module, table, handle.id
        dicts = [reference() for reference in (handle.hooks_dict_ref, *handle.extra_dict_ref)]
        self._entries = [(entries, entries[handle.id]) for entries in dicts if handle.id in entries]

    @property
    def fits(self) -> bool:
        """Whether the module looks for its hooks where it did when this was made."""
        return getattr(self._module, self._table) is self._entries[0][0]

    def put(self) -> None:
        for entries, value in self._entries:
            entries[self._id] = value

    def remove(self) -> None:
        for entries, _ in self._entries:
            entries.pop(self._id, None)


@dataclass(slots=True, eq=False)
class Set:
    """Some hooks, and all that follows from which they are."""

    bounds: tuple[Bound, ...]
    entries: list[nn.Module]  # modules whose call may be the outermost
    around: list[weakref.ref[nn.Module]]  # modules that hold hooked ones, the wrapper among them
    wanted: tuple[dict[tuple[str, str, str, bool], nn.Module], ...]  # values whose layouts are needed; with gradients
    slots: list[Slot] | None = None  # None: not made yet
    describes: bool = field(init=False)  # an edit asks about its call
    concern_others: bool = field(init=False)
    here: list[Bound] = field(init=False)  # not on another stage

    def __post_init__(self) -> None:
        self.describes = any(b.wants_call for b in self.bounds)
        self.concern_others = any(b.concerns_others for b in self.bounds)
        self.here = [b for b in self.bounds if b.module is not None]


class Sets:
    """The last sets of registered hooks. Those of ``capture`` and ``edit`` come once, and are not kept."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Bound, ...], Set] = {}

    def of(self, bounds: Iterable[Bound], make: Callable[[tuple[Bound, ...]], Set]) -> Set:
        bounds = tuple(bounds)
        found = self._kept.pop(bounds, None)
        if found is None or not all(slot.fits for slot in found.slots or ()):
            found = make(bounds)
        if not any(b.temporary for b in bounds):
            self._kept[bounds] = found
            while len(self._kept) > _KEPT:
                del self._kept[next(iter(self._kept))]
        return found

    def forget(self) -> None:
        """Hooks, names or engines have changed."""
        self._kept.clear()
