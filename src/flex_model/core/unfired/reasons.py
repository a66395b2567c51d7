"""Why a hook did not fire: read from the model as it is, from the code of the modules around, and what values met."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from flex_model.core.bound import WATCHED, Bound
from flex_model.core.unfired.compiled import is_compiled
from flex_model.core.unfired.usage import Use, module_forward, use_of

if TYPE_CHECKING:
    from flex_model.core.runtime import Runtime

__all__ = ["COMPILED", "Reason", "Reasons"]


@dataclass(frozen=True, slots=True)
class Reason:
    """``certain``: the hook would fire in no such call. ``quiet``: it is as it should be, and nothing to warn of."""

    text: str
    certain: bool = False
    quiet: bool = False


GONE = Reason("its module is no longer part of the model: another was put in its place", certain=True)
COMPILED = Reason(
    "it is inside of what was compiled after the hook was put on; from the next call on that runs as it is written",
    certain=True,
)
UNUSED_PARAMETER = Reason("what backward() was called on does not depend on this parameter")
UNUSED_VALUE = Reason("what backward() was called on does not depend on it")
NO_TOKEN = Reason("no token was sent to it", quiet=True)
UNKNOWN = "the code of the modules around it calls it, and yet it was not called"


class Reasons:
    """Reasons for several hooks of one model; what was read for one is not read again for the next."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._here = {id(m) for m in runtime.module.modules()}
        self._uses: dict[Any, Use | None] = {}

    def of(self, bound: Bound) -> Reason:
        """Why ``bound`` did not fire; of a captured value that came, why its gradient did not."""
        if bound.side == "param":
            found = self._not_run(bound)
            return found if found.certain and found.text != UNKNOWN else UNUSED_PARAMETER
        if not bound.met and not (bound.fired and not bound.is_gradient):
            return self._not_run(bound)
        if bound.met == WATCHED:
            return UNUSED_VALUE
        return Reason(bound.met, certain=True, quiet="which has no gradient" in bound.met)

    def _not_run(self, bound: Bound) -> Reason:
        if id(bound.module) not in self._here:
            return GONE
        if any(is_compiled(m) for m in self.runtime.installed.around(bound.name)):
            return COMPILED
        doubts: list[Reason] = []
        for parent, name, path in self._links(bound.name):
            subject = "" if name == bound.name else f"{name!r} did not run: "
            use = self._use(parent, path)
            told = _never(use, parent)
            if told:
                return Reason(subject + told, certain=True)
            doubts += [Reason(subject + d.text, quiet=d.quiet) for d in _doubts(use, parent, path)]
        if bound.source is not None:
            return NO_TOKEN
        return next((d for d in doubts if d.quiet), doubts[0] if doubts else Reason(UNKNOWN, certain=bool(bound.name)))

    def _links(self, name: str) -> Iterator[tuple[nn.Module, str, str]]:
        """(parent, name of the child, path from one to the other), from the model down; containers are no parents."""
        names = self.runtime.names
        parts, above = name.split(".") if name else [], ""
        for depth in range(1, len(parts) + 1):
            here = ".".join(parts[:depth])
            if here not in names.modules or (names.never_fires(here) and here != name):
                continue
            if above in names.modules:
                yield names.modules[above], here, here[len(above) :].lstrip(".")
            above = here

    def _use(self, parent: nn.Module, path: str) -> Use | None:
        key = (type(parent), module_forward(parent), re.sub(r"\d+", "*", path))
        if key not in self._uses:
            try:
                self._uses[key] = use_of(parent, path)
            except AttributeError:  # an engine's wrapper is between them
                self._uses[key] = None
        return self._uses[key]


def _never(use: Use | None, parent: nn.Module) -> str:
    """Why code that uses a child like this never calls it; empty if it may."""
    if use is None or use.called or use.passed:
        return ""
    if use.method:
        return f"{use.reader} calls its .{use.method}() directly, and hooks run where the module itself is called"
    if use.parameter:
        return f"{use.reader} uses its {use.parameter} without calling it"
    if use.parts:
        return f"{use.reader} uses its parts without calling it"
    own = {base.__dict__.get("forward") for base in type(parent).__mro__}
    was = "" if module_forward(parent) in own else f", which was put in the place of {type(parent).__name__}'s forward,"
    return f"{use.reader}{was} does not use it"


def _doubts(use: Use | None, parent: nn.Module, path: str) -> list[Reason]:
    """Why code may call a child in some cases and not in others."""
    if use is None:
        return [Reason(f"the code of {type(parent).__name__} cannot be read")]
    also = ""
    if use.parameter or use.method:
        also = f", and elsewhere uses its {use.parameter or use.method} without calling it"
    listed = path.rpartition(".")[0]
    if listed and (use.sometimes or use.one_of_many):
        return [Reason(f"{use.reader} runs only some of {listed!r}, and not this one{also}", quiet=True)]
    if use.sometimes:
        return [Reason(f"{use.reader} calls it in some cases only, and none of them came{also}")]
    if use.passed and not use.called:
        return [Reason(f"{use.reader} hands it on, and it was not called{also}")]
    return []
