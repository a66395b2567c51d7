"""``Stopping``: a forward ends as soon as every hook that is on has fired.

It is unwound by an exception that the outermost forward, or the block, takes up. On the way engines do what they do
after a forward (``Engine.held``): FSDP frees whole parameters, a pipeline's stage hands something on to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flex_model.core.call import ActiveCall, in_backward
from flex_model.engines.engine import Held
from flex_model.errors import RegistrationError
from flex_model.routing.watch import mark_shared

if TYPE_CHECKING:
    from flex_model.core.runtime import Runtime

__all__ = ["Stop", "Stopping"]

Place = tuple[int, str]  # a module's id, and the side of it that is waited for


class Stop(BaseException):
    """On its way through a forward; no ``except Exception`` of a model's takes it up."""

    def __init__(self) -> None:
        super().__init__()
        mark_shared(self)  # every rank stops, so that nobody has to be told


class Stopping:
    """What the forward that runs now is waiting for, while a block wants it stopped.

    ``cut``: what this forward returns is no output: it, or that of another stage, was stopped.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.cut = False
        self._blocks = 0
        self._waiting: set[Place] | None = None  # None: this forward runs to its end
        self._unwinding = False
        self._handles: list[Any] = []
        self._guarded: list[tuple[nn.Module, str, Any]] = []

    def __bool__(self) -> bool:
        return self._blocks > 0

    @contextmanager
    def block(self, wanted: bool) -> Iterator[None]:
        """Forwards in here are stopped. One that was not called through FlexModel ends the block, too."""
        if not wanted:
            yield
            return
        self._refuse()
        self._blocks += 1
        self.put_on()
        self.runtime.hooks_mark = ""
        try:
            yield
        except Stop:
            self.over()
        finally:
            self._blocks -= 1
            self.put_on()
            self.runtime.hooks_mark = ""

    def _refuse(self) -> None:
        runtime = self.runtime
        if runtime.whole.stage_axis is not None and all(h.answer is None for h in runtime.engines.held):
            names = " and ".join(runtime.engines.names)
            raise RegistrationError(
                f"stop=True: the stages of a pipeline under {names} cannot be stopped, because nothing tells what they "
                f"have to hand on; leave stop=False.",
                page="options-conflict",
            )

    def put_on(self) -> None:
        """Behind all hooks that are on: those must have fired."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module, attribute, before in reversed(self._guarded):
            module.__dict__.pop(attribute, None)
            if before is not None:
                module.__dict__[attribute] = before
        self._guarded.clear()
        if not self._blocks:
            return
        modules = {id(b.module): b.module for b in self.runtime.installed.enabled if b.module is not None}
        layers = [m for w in self.runtime.sum_watches if (m := w.layer) is not None]
        held = self.runtime.engines.held
        around = {id(m) for h in held for m in (h.module, h.around)}
        ends = {id(h.module): h for h in held if h.around is not h.module or h.answer is not None}
        for module in (*modules.values(), *layers):
            key = id(module)
            entered, left = (
                self._passed((key, "in"), key in around, None),
                self._passed((key, "out"), False, ends.get(key)),
            )
            self._handles.append(module.register_forward_pre_hook(entered))
            self._handles.append(module.register_forward_hook(left))
        for one in held:
            self._guard(one)

    # -- a forward ---------------------------------------------------------------------------------------------
    def begin(self, call: ActiveCall) -> None:
        """A forward begins, or that of a microbatch on a stage."""
        self._unwinding, self._waiting, self.cut = False, None, False
        runtime = self.runtime
        bounds = [b for b in runtime.installed.enabled if b.side != "param"]
        gradients = torch.is_grad_enabled() and any(b.is_gradient or b.gradient_sink is not None for b in bounds)
        if not self._blocks or gradients:
            return
        values = [b for b in bounds if not b.is_gradient]
        if not values:
            return
        if runtime.whole.stage_axis is not None:
            stages = runtime.names.stages
            holders = {id(b): holder.stage for b in values if (holder := stages.holder(b.name, b.side)) is not None}
            here, last = (runtime.whole.stage if call.place is None else call.place[0]), max(holders.values())
            self.cut = True
            if here < last:
                return
            values = [b for b in values if holders.get(id(b)) == here]
        self._waiting = {(id(b.module), b.side) for b in values if b.module is not None}
        self._waiting |= {(id(w.layer), "out") for w in runtime.sum_watches if w.layer is not None}

    def _passed(self, place: Place, guarded: bool, ends: Held | None) -> Callable[..., None]:
        """``guarded``: its own forward will find that nothing is waited for. ``ends``: whoever called it goes on, and
        stops when that is done."""

        def passed(*_: Any) -> None:
            waiting = self._waiting
            if waiting is None or self.runtime.quiet or self.runtime.active is None or in_backward() != -1:
                return
            waiting.discard(place)
            if waiting:
                return
            self.cut = True
            if ends is not None:
                self._unwinding = ends.answer is None
            elif not guarded:
                raise Stop

        return passed

    def over(self) -> None:
        """The forward was stopped: it ends here as others do at their end."""
        call = self.runtime.active
        self._unwinding, self._waiting = False, None
        if call is not None:
            call.depth = 0
            self.runtime.leave(call.module, None)

    # -- engines -----------------------------------------------------------------------------------------------
    def _guard(self, held: Held) -> None:
        module, attribute = held.module, held.attribute
        inner = getattr(module, attribute)

        @wraps(inner)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            answer = held.answer or self._unwind
            if self._waiting is not None and not self._waiting:
                return answer(args, kwargs)
            try:
                return inner(*args, **kwargs)
            except Stop:
                return answer(args, kwargs)

        self._guarded.append((module, attribute, module.__dict__.get(attribute)))
        module.__dict__[attribute] = guarded
        if held.answer is None:
            self._handles.append(held.around.register_forward_hook(self._go_on))

    def _unwind(self, *_: Any) -> None:
        self._unwinding = True

    def _go_on(self, *_: Any) -> None:
        if self._unwinding:
            self._unwinding = False
            raise Stop
