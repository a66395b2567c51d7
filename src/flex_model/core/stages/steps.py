"""``Steps``: a pipeline's schedule while it runs.

The engine that sees the schedule says when a step begins and ends, and which microbatch runs on which stage. Values
wait until the step is over; then its microbatches are put together and everything is delivered, on all ranks alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from flex_model.core.call import ActiveCall, Staged
from flex_model.core.save_ctx import Saved
from flex_model.core.stages.messages import Messages
from flex_model.core.stages.microbatches import merge_microbatches
from flex_model.errors import NameNotFoundError, RegistrationError

if TYPE_CHECKING:
    from flex_model.core.runtime import Runtime

__all__ = ["Steps"]

Place = tuple[int, int]  # stage, microbatch


@dataclass(eq=False, slots=True)
class _Step:
    index: int
    microbatches: int
    divide: int
    backward: bool
    base: Saved  # save_ctx before the step
    saved: dict[int, Saved] = field(default_factory=dict)  # by microbatch
    told: dict[Place, Saved] = field(default_factory=dict)  # what the stage before knows
    calls: dict[Place, ActiveCall] = field(default_factory=dict)
    staged: list[Staged] = field(default_factory=list)
    messages: Messages | None = None
    before: list[Tensor | None] = field(default_factory=list)  # the trainable modules' gradients


class Steps:
    """The conductor of one model. ``now`` is the step that runs, ``place`` the stage and microbatch in it."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.now: _Step | None = None
        self.place: Place | None = None

    # -- what the engine tells ---------------------------------------------------------------------------------
    def look(self) -> None:
        try:
            self.runtime.look()
        except NameNotFoundError:  # names collide: told where hooks are registered, and without hooks nobody asks
            if self.runtime.bounds:
                raise

    def holds(self, module: nn.Module) -> bool:
        return any(part is module for part in self.runtime.engines.parts.values())

    def stage_of(self, module: nn.Module | None) -> int:
        return next(stage for stage, part in self.runtime.engines.parts.items() if part is module)

    @contextmanager
    def step(self, microbatches: int, *, divide: int, backward: bool) -> Iterator[None]:
        runtime = self.runtime
        if self.now is not None or not (any(b.enabled for b in runtime.bounds) or len(runtime.modules)):
            yield
            return
        if backward and runtime.stopping:
            raise RegistrationError(
                "stop=True stops forwards, and this step of the schedule goes backward; use the schedule's eval().",
                page="options-conflict",
            )
        runtime.watch.call = runtime.calls
        runtime.agree()
        runtime.whole.prepare()
        self.now = _Step(runtime.calls, microbatches, divide, backward, runtime.save_ctx.held)
        self.now.messages = self._messages(microbatches)
        self.now.before = runtime.modules.set_aside() if backward else []
        runtime.calls += 1
        runtime.quiet = True  # what runs outside of forward and backward, to learn shapes, is no call
        if backward:
            runtime.backward.begin()
        try:
            yield
            self._finish()
        except BaseException as error:
            self._abandon(error)
            raise

    @contextmanager
    def forward(self, stage: int, microbatch: int) -> Iterator[None]:
        step = self.now
        if step is None:
            yield
            return
        saved = step.saved.setdefault(microbatch, step.base.copy())
        if step.messages is not None:
            step.messages.receive(saved, stage=stage, source=stage - 1, microbatch=microbatch)
            step.told[stage, microbatch] = saved.copy()
        with self._at((stage, microbatch), saved):
            yield
        if step.messages is not None:
            step.messages.send(saved, step.base, stage=stage, to=stage + 1, microbatch=microbatch)

    @contextmanager
    def backward(self, stage: int, microbatch: int) -> Iterator[None]:
        step, place = self.now, (stage, microbatch)
        if step is None:
            yield
            return
        saved = step.saved.setdefault(microbatch, step.base.copy())
        first = place in step.told  # a backward in two parts tells once
        if step.messages is not None and first:
            step.messages.receive(saved, stage=stage, source=stage + 1, microbatch=microbatch)
        self.runtime.backward.call = step.calls.get(place)
        try:
            with self._at(place, saved), self._own_parameters(stage):
                yield
        finally:
            self.runtime.backward.call = None
        if step.messages is not None and first:
            step.messages.send(saved, step.told.pop(place), stage=stage, to=stage - 1, microbatch=microbatch)

    @contextmanager
    def _at(self, place: Place, saved: Saved) -> Iterator[None]:
        runtime = self.runtime
        before = self.place, runtime.quiet
        self.place, runtime.quiet = place, False
        runtime.save_ctx.hold(saved)  # and until the next microbatch: a loss function may read it
        try:
            yield
        finally:
            self.place, runtime.quiet = before

    @contextmanager
    def _own_parameters(self, stage: int) -> Iterator[None]:
        """A backward in two parts asks the stage for its parameters: those of the trainable modules are among them."""
        part, name = self.runtime.engines.parts.get(stage), "_flex_model_trainable"
        if part is None or not len(self.runtime.modules):
            yield
            return
        part._modules[name] = self.runtime.modules
        try:
            yield
        finally:
            del part._modules[name]

    def _messages(self, microbatches: int) -> Messages | None:
        """The way of ``save_ctx`` between stages, if hooks on several of them use it."""
        names = self.runtime.names
        using = [b for b in self.runtime.bounds if b.enabled and b.uses_context]
        holders = [names.stages.holder(b.name, b.side) for b in using]
        if len({h.stage for h in holders if h is not None}) < 2:
            return None
        return Messages(self.runtime.whole, [t.coordinate for t in names.stages.tables], microbatches)

    # -- within a step -----------------------------------------------------------------------------------------
    def keep(self, call: ActiveCall) -> None:
        """A microbatch's forward on a stage is over."""
        assert self.now is not None and call.place is not None
        self.now.calls[call.place] = call
        self.now.staged += call.staged
        if call.claims and self.now.backward:  # gradients will come before the step ends
            self.runtime.inference.settle(call.claims)
        else:
            for form, claim in call.claims.items():
                self.runtime.outbox.claims.setdefault(form, claim)

    # -- its end -----------------------------------------------------------------------------------------------
    def _finish(self) -> None:
        step, runtime = self.now, self.runtime
        assert step is not None
        backward = step.backward
        self._leave(step)
        self._merge_saved(step)
        if step.messages is not None:
            step.messages.wait()
        gradients = runtime.backward.end() if backward else []
        whole, refused = merge_microbatches([*step.staged, *gradients], step.microbatches, step.divide)
        whole += runtime.backward.finished_parameters(step.index) if backward else []
        runtime.outbox.waiting += whole
        runtime.outbox.refused += [(one.bound, one.key, error) for one, error in refused]
        if backward:
            inside = any(m is runtime.modules for part in runtime.engines.parts.values() for m in part.modules())
            runtime.modules.complete(runtime.whole, runtime.mesh, 1 if inside else step.divide, step.before)
        runtime.outbox.point(edited=True)
        if runtime.missed.looks(step.index):
            runtime.missed.after_call(None)
        if backward:
            runtime.missed.after_backward()

    def _abandon(self, error: BaseException) -> None:
        step, runtime = self.now, self.runtime
        if step is None:  # the step itself went well, its delivery did not
            runtime.watch.fail(error)
            return
        self._leave(step)
        runtime.modules.put_back(step.before)
        runtime.backward.forget()
        runtime.abandon(error)

    def _leave(self, step: _Step) -> None:
        self.now = self.place = None
        self.runtime.quiet = False
        self.runtime.save_ctx.hold(step.base)

    def _merge_saved(self, step: _Step) -> None:
        for microbatch in sorted(step.saved):  # the last one's word stays
            saved = step.saved[microbatch]
            step.base.withheld.update(saved.withheld)
            for name, value in saved.changed_since(step.base).items():
                step.base.values[name] = value
                step.base.withheld.pop(name, None)
