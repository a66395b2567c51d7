"""``Installed``: the torch hooks that are on a model just now. None where no hook is enabled."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flex_model.core import fast
from flex_model.core.bound import Bound
from flex_model.core.firing import Point
from flex_model.core.slots import Set, Sets, Slot
from flex_model.core.unfired.compiled import Compiled
from flex_model.layout.values import sharding
from flex_model.routing.rows import parted_axes

if TYPE_CHECKING:
    from flex_model.core.runtime import Runtime

__all__ = ["Installed"]


def _as_it_is(hook: Any) -> Any:
    return hook


class Installed:
    """``stale``: hooks that see a call's end are those of another set, until that call is over."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.enabled: tuple[Bound, ...] = ()
        self.describes = False  # whether an edit asks about its call
        self.concern_others = False  # whether ranks have anything to tell one another of those that are on
        self.wanted: tuple[dict[tuple[str, str, str, bool], nn.Module], ...] = ({}, {})
        self.uneven = False  # ranks may meet hooks unequally often: rows at experts are where tokens have chosen them
        self.stale = False
        self.sets = Sets()
        self._shown: tuple[Bound, ...] = ()  # those whose torch hooks are on modules: others only in a recomputation
        self._compiled = Compiled()
        self._around: list[weakref.ref[nn.Module]] = []  # the modules that hold hooked ones, the wrapper among them
        self._slots: list[Slot] = []
        self._entry_handles: list[Any] = []
        self._parameter_handles: list[Any] = []
        self._watch_handles: list[Any] = []

    def take_off(self) -> None:
        """Take all hooks off; within a call, those that see its end stay until then."""
        self.stale = self.runtime.active is not None
        self._take_off_slots()
        for handles in (
            self._parameter_handles,
            self._watch_handles,
            [] if self.runtime.active else self._entry_handles,
        ):
            for handle in handles:
                handle.remove()
            handles.clear()
        self.enabled, self._around = (), []
        self._compiled.step_back()

    def _take_off_slots(self) -> None:
        for slot in self._slots:
            slot.remove()
        self._slots, self._shown = [], ()

    def put_on(self) -> None:
        """Put the enabled hooks on the model, and nothing where none is enabled."""
        self.take_off()
        self.runtime.hooks_mark = ""
        now = self._set_of(b for b in self.runtime.bounds if b.enabled)
        self.enabled, self.describes, self.wanted = now.bounds, now.describes, now.wanted
        self.concern_others = now.concern_others
        self.runtime.outbox.owed |= now.concern_others
        entries = now.entries if self.enabled and self.runtime.active is None else []
        self._step_aside(now)
        outside: Callable[..., Any] = torch.compiler.disable if "torch._dynamo" in sys.modules else _as_it_is
        for module in entries:
            enter = outside(self.runtime.enter)
            self._entry_handles.append(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
        self.runtime.missed.arm(now.here)
        self.put_on_parameters()
        self.look_on()
        self._put_on_slots(now)
        for module in entries:
            self._entry_handles.append(module.register_forward_hook(outside(self.runtime.left)))
            self._entry_handles.append(module.register_forward_hook(outside(self.runtime.failed), always_call=True))
        for watch in self.runtime.sum_watches:
            watch.put_on()
        self.runtime.stopping.put_on()

    def _set_of(self, bounds: Iterable[Bound]) -> Set:
        return self.sets.of(bounds, self._make_set)

    def _make_set(self, bounds: tuple[Bound, ...]) -> Set:
        around = {id(m): m for name in {b.name for b in bounds} for m in self.around(name)}
        wanted = _values_wanted(bounds, gradients=False), _values_wanted(bounds, gradients=True)
        return Set(bounds, self._entries(bounds), list(map(weakref.ref, around.values())), wanted)

    def show(self, bounds: tuple[Bound, ...]) -> None:
        """Have these hooks on modules, whatever is on: a forward that had them runs again."""
        if bounds != self._shown:
            self._take_off_slots()
            shown = self._set_of(bounds)
            self._step_aside(shown)
            self._put_on_slots(shown)

    def show_again(self) -> None:
        """The hooks that are on, after others were shown."""
        if self._shown != self.enabled:
            self.put_on()

    def _put_on_slots(self, wanted: Set) -> None:
        if wanted.slots is not None:
            for slot in wanted.slots:
                slot.put()
        else:
            by_place: dict[tuple[int, str], list[Bound]] = {}
            for bound in wanted.here:
                if bound.side != "param":
                    by_place.setdefault((id(bound.module), bound.side), []).append(bound)
            wanted.slots = [self._slot(side, here) for (_, side), here in by_place.items()]
        self._slots, self._shown = wanted.slots, wanted.bounds

    def _step_aside(self, now: Set) -> None:
        self._around = now.around
        self._compiled.step_aside([m for ref in now.around if (m := ref()) is not None])

    def compiled_late(self) -> None:
        """What was compiled since hooks were put on steps aside now, if it can be seen without a call."""
        around = [m for ref in self._around if (m := ref()) is not None]
        if any(m._compiled_call_impl is not None for m in around):
            self._compiled.step_aside(around)

    def around(self, name: str) -> Iterator[nn.Module]:
        """All modules that hold the one of a clean name, the wrapper included."""
        yield self.runtime.outermost
        yield from self.runtime.names.around(name)

    def _entries(self, enabled: Sequence[Bound]) -> list[nn.Module]:
        """Modules whose call may be the outermost: the model, and the parts one or two levels down that hold hooks."""
        found = {str(stage): part for stage, part in self.runtime.names.places[""].items()}
        for bound in enabled:
            parts = bound.name.split(".")
            for depth in (1, 2):
                name = ".".join(parts[:depth])
                module = self.runtime.names.modules.get(name)
                if len(parts) > depth and module is not None and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                    found[name] = module
        return list(found.values())

    def _slot(self, side: str, bounds: list[Bound]) -> Slot:
        module = bounds[0].module
        assert module is not None
        point = Point(self.runtime, bounds[0].name, side, bounds)
        if side == "in":
            register = module.register_forward_pre_hook
            return Slot(module, "_forward_pre_hooks", register, point.on_input, with_kwargs=True)
        hook = fast.output_hook(self.runtime, point, bounds) or point.on_output
        return Slot(module, "_forward_hooks", module.register_forward_hook, hook)

    def put_on_parameters(self) -> None:
        for handle in self._parameter_handles:
            handle.remove()
        self._parameter_handles.clear()
        for bound in self.enabled:
            if bound.side == "param" and bound.module is not None:
                owner, attribute = self.runtime.names.parameters[bound.name]
                _, site = self.runtime.engines.gradient_site(owner, attribute)
                parameter = self.runtime.names.parameter(bound.name)
                if site.when == "local" and parameter is not None and parameter.requires_grad:
                    hook = partial(self.runtime.backward.on_parameter, bound, site, sharding(parameter))
                    self._parameter_handles.append(parameter.register_hook(hook))

    def look_on(self) -> None:
        """Look on at the mixtures of experts that enabled hooks are inside of."""
        for handle in self._watch_handles:
            handle.remove()
        sources = {id(b.source): b.source for b in self.enabled if b.source is not None}.values()
        self._watch_handles = [handle for source in sources for handle in source.watch()]
        self.uneven = any(parted_axes(self.runtime.mesh, source) for source in sources)


def _values_wanted(bounds: Sequence[Bound], *, gradients: bool) -> dict[tuple[str, str, str, bool], nn.Module]:
    return {
        (b.name, b.side, repr(b.hook.unpack_idx), b.is_gradient): b.module  # a gradient may never come
        for b in bounds
        if b.side != "param" and b.module is not None and (gradients or not b.is_gradient)
    }
