"""``Asked``: one site that ``capture`` or ``edit`` was asked for, by a pattern or by a place that ``fm.at`` found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from flex_model.components.place import Place, Spot
from flex_model.components.within import Within
from flex_model.core.hook_function import HookType
from flex_model.core.naming.globs import Pattern
from flex_model.core.naming.names import Names
from flex_model.errors import RegistrationError

__all__ = ["Asked", "asked", "modules_of"]


@dataclass(frozen=True, slots=True)
class Asked:
    """Where a hook goes, and the key of what it captures."""

    key: str
    name: str  # clean
    hook_type: HookType
    unpack_idx: Any
    select: Any
    spot: Spot | None = None


def asked(
    names: Names, patterns: Iterable[Pattern | Place], *, hook_type: HookType, unpack_idx: Any, select: Any
) -> list[Asked]:
    """Every site once, in the order of the patterns; places have their own hook type and tensor."""
    of = "parameter" if hook_type == "tensor" else "module"
    found: list[Asked] = []
    for pattern in _flat(patterns):
        if isinstance(pattern, Place):
            found += [_of_spot(s, hook_type, unpack_idx, select) for s in pattern.spots]
        else:
            pairs = names.match(pattern, of=of)
            found += [Asked(key, clean, hook_type, unpack_idx, select) for key, clean in pairs]
    once = {(a.name if a.spot is None else a.key, a.spot is None): a for a in reversed(found)}
    return list(once.values())[::-1]


def modules_of(patterns: Pattern | Place | Iterable[Pattern | Place]) -> Pattern:
    """Places as the names of the modules they are in, for what is about whole modules; patterns as they are."""
    if isinstance(patterns, str) or callable(patterns):
        return patterns
    given = [patterns] if isinstance(patterns, Place) else list(_flat(patterns))
    names: list[Any] = [n for p in given for n in ([s.name for s in p.spots] if isinstance(p, Place) else [p])]
    return list(dict.fromkeys(names))


def _flat(patterns: Iterable[Pattern | Place]) -> Iterator[Pattern | Place]:
    for pattern in patterns:
        if isinstance(pattern, (str, Place)) or callable(pattern):
            yield pattern
        else:
            yield from _flat(pattern)


def _of_spot(spot: Spot, hook_type: HookType, unpack_idx: Any, select: Any) -> Asked:
    """The arguments' defaults say nothing about a place; anything else must not contradict it."""
    if hook_type not in ("forward", spot.hook_type):
        gradient = "; take gradients with grad=True" if hook_type not in ("forward_pre", "tensor") else ""
        raise RegistrationError(
            f"{spot.key!r} is hooked with hook_type={spot.hook_type!r}, not with {hook_type!r}{gradient}.",
            page="options-conflict",
        )
    if unpack_idx not in (0, spot.unpack_idx):
        raise RegistrationError(
            f"{spot.key!r} is the tensor {spot.unpack_idx} of {spot.name!r}; leave out unpack_idx={unpack_idx!r}.",
            page="options-conflict",
        )
    chosen = spot.select if select is None else select
    if select is not None and spot.select is not None:
        chosen = Within(spot.select, select)
    return Asked(spot.key, spot.name, spot.hook_type, spot.unpack_idx, chosen, spot)
