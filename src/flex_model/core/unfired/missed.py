"""``Missed``: hooks that did not fire although they should have, and why.

Nothing is looked at while hooks fire. After the first call with a hook, and at the end of a block, the counts of what
fired are compared; for those that did not, ``core/unfired/reasons.py`` reads the reason from the model.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flex_model.core.bound import WATCHED, Bound
from flex_model.core.unfired.compiled import frames_compiled, is_compiled, something_is_compiled
from flex_model.core.unfired.reasons import COMPILED, Reason, Reasons
from flex_model.errors import MissedHookWarning
from flex_model.trees import tensors

if TYPE_CHECKING:
    from flex_model.core.runtime import Runtime

__all__ = ["Block", "Missed", "mark_watched"]

PATIENCE = 3  # calls after which a hook that may fire in another call is no longer looked at
CUT = (
    "nothing that the model returned depends on it with a graph: what follows detaches it, runs without gradients, "
    "puts another value in its place, or does not use it"
)
NOT_CALLED = "nothing has called the model since"
COMPILED_AROUND = f"{NOT_CALLED}; if what calls it was compiled before, call torch.compiler.reset() with the hooks on"
Pending = tuple[Bound, int]  # a hook, and how often it had fired


def mark_watched(watchers: Iterable[tuple[Bound, bool]], alias: torch.Tensor) -> None:
    """Note on the graph whose gradient ``alias`` is watched for."""
    alias.grad_fn.watchers = [b for b, _ in watchers]  # type: ignore[union-attr]


class Missed:
    """What one model's hooks have missed. ``pending``: registered hooks that have yet to fire; empty once all have."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.pending: list[Pending] = []
        self.backwards = 0  # that are done
        self.calls: dict[int, int] = {}  # {id of an outermost module: the index of its last call}
        self._tries: dict[Bound, int] = {}  # calls without a firing
        self._told: set[Bound] = set()
        self.walkers: list[Bound] = []  # whose values the next call's graph is searched for
        self._frames, self._before = frames_compiled(), list[Pending]()  # as the call began
        self._armed = 0  # the number of calls as hooks were put on
        self._whole = False  # whether a call was over since that had begun after it
        self.known: set[tuple[str, str]] = set()  # sites whose gradients have been met

    def looks(self, call: int) -> bool:
        """Whether something is to be looked at when this call is over, whose hooks were on when it began."""
        return bool(self.pending or self.walkers or self._frames != frames_compiled()) and self._armed <= call

    def before_call(self) -> None:
        """The compiler is there: should it meet the model in this call, hooks that have fired before may be missed."""
        self._frames = frames_compiled()
        self._before = [(b, b.fired) for b in self.runtime.installed.enabled if b.fired]

    # -- registered hooks --------------------------------------------------------------------------------------
    def arm(self, enabled: Sequence[Bound]) -> None:
        """These hooks are on: look at them until each has fired."""
        on = [b for b in enabled if not b.temporary]
        if self._told or self._tries:
            on = [b for b in on if b not in self._told and self._tries.get(b, 0) < PATIENCE]
        self.pending = [(b, b.reached if b.is_gradient else b.fired + b.told) for b in on]
        self._armed, self._whole = self.runtime.calls, False
        wanted = [b for b in enabled if b.side != "param" and (b.is_gradient or b.gradient_sink is not None)]
        self.walkers = [b for b in wanted if not b.reached and (b.name, b.side) not in self.known]

    def after_call(self, module: nn.Module | None, output: Any = None) -> None:
        """A forward of ``module`` is over, or a pipeline's step: which values were missed in it?"""
        self._whole = True
        if self.walkers and torch.is_grad_enabled() and module is not None:
            _mark_cut(self.walkers, output)
            self.walkers = []
        new = self._frames != frames_compiled() and any(map(is_compiled, self.runtime.outermost.modules()))
        if new:  # what is compiled steps aside, so that they fire from now on
            self._frames = frames_compiled()
            lost = [b for b, n in self._before if b.fired == n and not b.is_gradient]
            self.tell([(b, COMPILED) for b in lost])
            self._told.difference_update(lost)
        pending = [p for p in self.pending if _count(p[0]) == p[1]]
        now = [b for b, _ in pending if not b.is_gradient and (module is None or self._holds(module, b))]
        self._look(now, pending)
        if new:
            self.runtime.installed.put_on()

    def after_backward(self) -> None:
        """A backward is over: which gradients were missed in it?"""
        self.backwards += 1
        pending = [p for p in self.pending if _count(p[0]) == p[1]]
        self._look([b for b, _ in pending if b.is_gradient and (b.met or self._whole)], pending)

    def _look(self, missing: Sequence[Bound], pending: list[Pending]) -> None:
        """Tell of those that will never fire; the others are looked at in some more calls."""
        self.pending = pending
        if not missing:
            return
        reasons = Reasons(self.runtime)
        found = [(b, reasons.of(b)) for b in missing]
        for bound, reason in found:
            bound.missed = reason.text
            self._tries[bound] = self._tries.get(bound, 0) + 1
        self.tell([(b, r) for b, r in found if r.certain])
        self.pending = [p for p in pending if p[0] not in self._told and self._tries.get(p[0], 0) < PATIENCE]

    def _holds(self, module: nn.Module, bound: Bound) -> bool:
        return any(m is module for m in self.runtime.installed.around(bound.name))

    def tell(self, found: Iterable[tuple[Bound, Reason]], where: str = "") -> None:
        """One warning a reason, which names all hooks that it keeps from firing."""
        table: dict[str, list[Bound]] = {}
        for bound, reason in found:
            self._told.add(bound)
            table.setdefault(reason.text, []).append(bound)
        for text, bounds in table.items():
            names = ", ".join(b.where for b in bounds[:5]) + (f" and {len(bounds) - 5} more" if len(bounds) > 5 else "")
            hooks = "the hook on" if len(bounds) == 1 else "the hooks on"
            warnings.warn(f"{hooks} {names} did not fire{where}: {text}.", MissedHookWarning, stacklevel=3)

    def over(self, bounds: Sequence[Bound]) -> None:
        """Hooks are taken off: tell of those that were missed in some calls, never fired, and were not told of."""
        reasons = Reasons(self.runtime)
        missing = [b for b in bounds if b.enabled and b.module is not None and not _count(b) and b not in self._told]
        found = [(b, reasons.of(b)) for b in missing if b.missed]
        if missing and not found and all(b.since == self.runtime.calls for b in missing):
            found = [(b, not_called()) for b in missing]
        self.tell([(b, r) for b, r in found if not r.quiet])
        self.forget(bounds)

    def forget(self, bounds: Iterable[Bound]) -> None:
        for bound in bounds:
            self._tries.pop(bound, None)
            self._told.discard(bound)
        self.pending = [p for p in self.pending if p[0] not in set(bounds)]


def not_called() -> Reason:
    """As far as hooks can see. Code that was compiled without them is not seen."""
    return Reason(COMPILED_AROUND) if something_is_compiled() else Reason(NOT_CALLED, quiet=True)


def _count(bound: Bound) -> int:
    return bound.reached if bound.is_gradient else bound.fired + bound.told


def _mark_cut(bounds: Sequence[Bound], output: Any) -> None:
    """Which watched values have no way to what the model returned?"""
    if not any(b.met == WATCHED for b in bounds):
        return
    reached: set[Bound] = set()
    nodes: list[Any] = [t.grad_fn for t in tensors(output)]
    seen: set[Any] = {None}
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            reached.update(getattr(node, "watchers", ()))
            nodes += [n for n, _ in node.next_functions]
    for bound in bounds:
        if bound.met == WATCHED and bound not in reached:
            bound.met = CUT


class Block:
    """The hooks of one ``capture`` or ``edit`` block: what they missed is told at its end, or where it is asked for."""

    def __init__(self, missed: Missed, bounds: Sequence[Bound]) -> None:
        self._missed = weakref.ref(missed)
        self._bounds = [b for b in bounds if b.module is not None]  # the others are on another stage
        self._calls, self._backwards = missed.runtime.calls, missed.backwards
        self._said: dict[Bound, str] = {}

    def end(self) -> None:
        """Nothing of the block will fire any more."""
        missed = self._missed()
        assert missed is not None
        missed.known.update((b.name, b.side) for b in self._bounds if b.reached)
        lacking = [b for b in self._bounds if self._lacks(missed, b)]
        if not lacking:
            return
        reasons = Reasons(missed.runtime)
        found = [(b, self._reason(missed, reasons, b)) for b in lacking]
        self._said = {b: r.text for b, r in found}
        missed.tell([(b, r) for b, r in found if not (r.quiet or self._has_none(b))], " in this block")
        missed.forget(self._bounds)

    def _has_none(self, bound: Bound) -> bool:
        """Whether it is one of many whose gradients came, and nothing in it is frozen: positions, say, have none."""
        if not (bound.is_gradient and bound.met and bound.met not in (WATCHED, CUT)) or bound.edit is not None:
            return False
        frozen = bound.module is None or any(True for _ in bound.module.parameters())
        return not frozen and any(b.reached for b in self._bounds)

    def _lacks(self, missed: Missed, bound: Bound) -> bool:
        if bound.told:
            return False
        if not bound.is_gradient and not bound.fired:
            return True
        wanted = bound.is_gradient or bound.gradient_sink is not None
        return wanted and not bound.reached and missed.backwards > self._backwards

    def _reason(self, missed: Missed, reasons: Reasons, bound: Bound) -> Reason:
        if missed.runtime.calls == self._calls:
            return not_called()
        called = {i for i, index in missed.calls.items() if index >= self._calls}
        if called and not (
            bound.met or bound.fired or any(id(m) in called for m in missed.runtime.installed.around(bound.name))
        ):
            return Reason("only other parts of the model were called, by themselves")
        return reasons.of(bound)

    def explain(self, key: Any, gradient: bool) -> str:
        """Why the value of ``key``, or its gradient, is not there; empty if it was met."""
        missed = self._missed()
        bound = next((b for b in self._bounds if key == b.key or getattr(key, "name", None) == b.name), None)
        if bound is None or bound.told or (bound.reached if gradient or bound.is_gradient else bound.fired):
            return ""
        if bound in self._said:
            return self._said[bound]
        if missed is None:
            return ""
        if (bound.is_gradient or bound.fired) and missed.backwards == self._backwards and bound.met == WATCHED:
            return "no backward has come to it"
        return self._reason(missed, Reasons(missed.runtime), bound).text
