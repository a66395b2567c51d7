"""``Runtime``: the hooks of one model while they are on, the calls they belong to, and the points where values move.

A forward of the outermost module is a call. What it captures is staged and delivered at its end, or later where ranks
do not run in lockstep; gradients at the end of the outermost backward.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from flex_model.components.place import Sum
from flex_model.core import fast
from flex_model.core.agreeing.same_hooks import line_of, mark_of
from flex_model.core.backward import Backward
from flex_model.core.bound import Bound
from flex_model.core.call import ActiveCall, Staged, in_backward, runs_already
from flex_model.core.editing import EditContext
from flex_model.core.groups import Groups
from flex_model.core.inference import Inference
from flex_model.core.installed import Installed
from flex_model.core.naming.names import Names
from flex_model.core.outbox import Outbox
from flex_model.core.ragged import merge
from flex_model.core.register import fails_alike, on_mesh
from flex_model.core.save_ctx import SaveContext
from flex_model.core.stages.steps import Steps
from flex_model.core.stopping import Stopping
from flex_model.core.sums import SumWatch
from flex_model.core.trainable import TrainableModules
from flex_model.core.unfired.missed import Missed
from flex_model.engines import Engines
from flex_model.engines.unsupported import refuse_transform, refuse_unsupported
from flex_model.layout.layout import Layout
from flex_model.layout.mesh import ModelMesh
from flex_model.routing.collectives import all_gather_objects
from flex_model.routing.copies import Copies
from flex_model.routing.memory import Memory
from flex_model.routing.roll_call import roll_call
from flex_model.routing.watch import NoWatch, Watch

__all__ = ["Runtime"]

logger = logging.getLogger(__name__)
_initialized = dist.is_initialized if dist.is_available() else lambda: False


_runtimes: WeakSet[Runtime] = WeakSet()


class Runtime:
    """Everything FlexModel keeps about one wrapped model. Hooks hold this, never the FlexModel itself."""

    def __init__(
        self,
        module: nn.Module,
        *,
        mesh: DeviceMesh | None,
        device: torch.device | None,
        mean: bool,
        timeout: timedelta,
        renamed: Mapping[str, str],
    ) -> None:
        self.renamed = renamed
        self.module, self.given_mesh, self.device = module, mesh, device
        self.mean, self.timeout = mean, timeout
        self.wrapper: weakref.ref[nn.Module] = weakref.ref(module)  # the FlexModel, once there is one
        self.bounds: list[Bound] = []
        self.groups = Groups()
        self.save_ctx = SaveContext()
        self.modules = TrainableModules()
        self.seed = 0
        self.quiet = False
        self.direct = False  # the forward comes through FlexModel itself
        self.active: ActiveCall | None = None
        self.fast_call: ActiveCall | None = None  # the active call, where the short way of one process is right
        self.last_inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.sums_hold: set[Sum] = set()  # of residual streams, seen in a forward
        self.sum_watches: list[SumWatch] = []  # for those that have not been seen
        self.calls = 0
        self.remembered: WeakValueDictionary[int, ActiveCall] = WeakValueDictionary()  # their graphs hold them
        self.memory = Memory()
        self.copies = Copies(self.memory)
        self.outbox = Outbox(self)
        self.backward = Backward(self)
        self.steps = Steps(self)
        self.missed = Missed(self)
        self.installed = Installed(self)
        self.stopping = Stopping(self)
        self.watch: Watch | NoWatch = NoWatch()
        self.hooks_mark = ""  # what all ranks have agreed on; empty after a change
        self._agreed: set[tuple[int, str]] = set()
        self._told = False
        self._mark: object = None
        _runtimes.add(self)
        self.refresh()
        Engines.listen(self.steps)

    def wrapped_by(self, wrapper: nn.Module) -> None:
        """The FlexModel: an engine may be applied to it as well as to the model in it."""
        self.wrapper = weakref.ref(wrapper)
        self._mark = self._engine_mark()

    @property
    def outermost(self) -> nn.Module:
        wrapper = self.wrapper()
        return self.module if wrapper is None else wrapper

    # -- the model and its engines -----------------------------------------------------------------------------
    def refresh(self) -> None:
        """Look at the model anew: names, engines, mesh. Layouts found before are forgotten."""
        self.hooks_mark, self._agreed = "", set()
        self.installed.sets.forget()
        refuse_unsupported(self.module)
        root = Names(self.module).root
        parts_of_rank = root.children() if isinstance(root, nn.ModuleList) else ()  # wrapped each for itself
        nested = [self.outermost, self.module, root, *parts_of_rank]
        self.engines = Engines(nested, getattr(self, "engines", None))
        self.whole: ModelMesh = self.engines.mesh(self.given_mesh, timeout=self.timeout, mean=self.mean)
        parts = {s: self.module if p is self.outermost else p for s, p in self.engines.parts.items()}
        parts = parts or {self.whole.stage: self.module}
        self.names = Names(
            self.module, parts=parts, absent=self.engines.absent, renamed={**self.engines.renamed, **self.renamed}
        )
        self._start_watch()
        self.root = self.names.root
        self.names.add_hidden(self.engines.hidden_parameters())
        self.names.add_tied(self.engines.tied_places())
        self.mesh: ModelMesh = self.whole.one_stage()  # layouts and edits are a matter of one stage's ranks
        for bound in self.bounds:
            bound.axes, bound.override = on_mesh(bound.hook, self.mesh, bound.where)
        self.inference = Inference(self.engines, self.mesh, list(self.names.places[""].values()))
        for bound in self.bounds:
            bound.source = None if bound.side == "param" else self.engines.row_source(bound.module)
            bound.alike = fails_alike(self, bound.hook, bound.module)
        self.context = EditContext(self.mesh, self.save_ctx, self.modules, self.seed)
        if self.whole.axes:
            self.context.on_failure = self.outbox.status.note_failure
        self.keep_alive = self.engines.keep_alive
        self._mark = self._engine_mark()
        buffers = (b for m in self.module.modules() for b in m._buffers.values() if b is not None)
        tensors = (*self.module.parameters(), *buffers)  # Megatron-core's wrapper calls something else ``buffers``
        devices = {t.device for t in tensors if not t.is_meta} | self.engines.devices()
        self.gpus = [d for d in devices if d.type == "cuda"]
        first = next((p.device.type for p in self.module.parameters() if not p.is_meta), "cpu")
        self.device_of_values = torch.device(first)
        self.on_one_device = len(devices) <= 1

    def _start_watch(self) -> None:
        whole = self.whole
        if not whole.axes or dist.get_backend() == "fake":  # whose other ranks are not there
            self.watch = NoWatch()
        elif not isinstance(self.watch, Watch) or self.watch.ranks != whole.ranks:
            self.watch = Watch(whole.ranks, whole.rank, self.timeout, whole.leave)
        else:
            self.watch.leaves(whole.leave)

    def agree(self) -> None:
        """Make sure that all ranks have the same hooks on. Collective where the set is a new one."""
        watch = self.watch
        if self.hooks_mark or not isinstance(watch, Watch):
            return
        lines = [line_of(bound) for bound in self.bounds if bound.enabled] + ["stop=True"] * bool(self.stopping)
        mark = mark_of(lines)
        if (watch.epoch, mark) not in self._agreed:
            roll_call(watch, mark, lines)
            self._agreed.add((watch.epoch, mark))
        self.hooks_mark = mark

    def notice(self) -> None:
        """Look at the model anew if an engine was applied, or removed, since the last look."""
        if self._engine_mark() != self._mark:
            self.refresh()
            self.installed.put_on_parameters()
            self.installed.look_on()

    def look(self) -> None:
        """Learn of engines applied since and of other stages' names. Collective where there are any."""
        self.notice()
        axis = self.whole.stage_axis
        if axis is not None and not self.names.stages:
            with self.watch.at("the exchange of names between stages"):
                self.whole.prepare()
                tables = all_gather_objects(self.names.table(self.whole.stage), self.whole.group(axis))
            self.names.learn([t for theirs in tables for t in theirs])
            if not self.engines.plain_names:
                self.names.check_collisions()
            for bound in self.bounds:
                bound.module = self.names.module_of(bound.name, bound.side)
            self.installed.sets.forget()
            self.installed.put_on()

    def _engine_mark(self) -> object:
        """Changes when an engine was applied, or removed, since the last look."""
        if not _initialized():
            return None
        first = next(self.root.parameters(), None)
        active = None if "DDP" in self.engines.names else DistributedDataParallel._get_active_ddp_module()
        # after a forward FSDP2 leaves the root's parameters whole
        sharded = "FSDP2" in self.engines.names or getattr(first, "_spec", None) is not None
        return (
            active,
            self.engines.alive,
            Engines.switched_on(),
            Engines.stages_made(),
            type(self.outermost),
            type(self.root),
            sharded,
        )

    # -- calls -------------------------------------------------------------------------------------------------
    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward of an entry module starts; the outermost one is the call."""
        if self.quiet or in_backward() != -1:
            return
        if self.active is not None:
            if self.active.module is not module:
                return
            if runs_already(module):
                self.active.depth += 1
                return
        if self.backward.call is not None:  # a backward that failed
            self.backward.forget()
        if torch._C._functorch.peek_interpreter_stack() is not None:
            refuse_transform([b.where for b in self.bounds if b.enabled and (self.whole.axes or b.sink is not None)])
        step = self.steps.now
        if step is None:
            self.notice()
        index = self.calls if step is None else step.index
        if self.whole.axes:
            self.watch.call = index
            if step is None and not self.hooks_mark and self.engines.lockstep:
                self.agree()
        grad_mode = torch.is_grad_enabled()
        self.active = ActiveCall(
            module, index, args, kwargs, grad_mode, self.steps.place, bounds=self.installed.enabled
        )
        if self.installed.describes:
            self.active.note_past()
        self.active.idle = bool(self.whole.axes) and not grad_mode and Engines.keeps_company()
        self.fast_call = None if self.whole.axes or torch.is_inference_mode_enabled() else self.active
        self.missed.calls[id(module)] = self.calls
        if "torch._dynamo" in sys.modules:
            self.installed.compiled_late()
            self.missed.before_call()
        self.calls += step is None
        if step is not None and self.mesh.axes:
            self.last_inputs = (args, kwargs)
        self.inference.new_call(module, args, kwargs)
        wanted = self.installed.wanted[grad_mode]
        if self.inference.lacks(wanted):
            with self.silent():
                self.inference.begin(module, args, kwargs, wanted)
        if self.stopping:
            self.stopping.begin(self.active)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Forwards in here are nobody's call: no hook of ours does anything."""
        before = [(r, r.quiet, r.active, r.fast_call) for r in _runtimes]  # parts of the model may be wrapped, too
        for runtime in _runtimes:
            runtime.quiet, runtime.active, runtime.fast_call = True, None, None
        try:
            with self.engines.undisturbed(), self.uncompiled():
                yield
        finally:
            for runtime, quiet, active, fast_call in before:
                runtime.quiet, runtime.active, runtime.fast_call = quiet, active, fast_call

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Compiled parts of the model run as they are written: what was compiled without a hook would not run it."""
        if not self.names.compiled:
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            yield

    def call_now(self) -> ActiveCall:
        """The call a firing belongs to; in a recomputation, the one whose backward runs."""
        if self.active is not None:
            return self.active
        if self.backward.call is not None:
            return self.backward.call
        for call in reversed(list(self.remembered.values())):
            return call
        return ActiveCall(self.root, self.calls, (), {})

    def left(self, module: nn.Module, args: Any, output: Any) -> None:
        self.leave(module, output)

    def failed(self, module: nn.Module, args: Any, output: Any) -> None:
        """Runs after ``left``, and without it where the forward raised."""
        if self.quiet or self.active is None or self.active.module is not module:
            return
        if self.active.depth:
            self.active.depth -= 1
        else:
            self.abandon(sys.exc_info()[1])

    def abandon(self, error: BaseException | None) -> None:
        """The call is over without a result: what it staged goes, and who waits for this rank is told why."""
        self.active = self.fast_call = None
        self.inference.end()
        self.outbox.status.clear()
        self.outbox.refused.clear()
        if self.installed.stale:
            self.installed.put_on()
        if error is not None:
            self.watch.fail(error)

    def leave(self, module: nn.Module, output: Any) -> None:
        """The forward is over. Deliver what it captured if all ranks are here, or keep it for a later point."""
        call = self.active
        if self.quiet or call is None or call.module is not module or call.depth or in_backward() != -1:
            return
        self.active = self.fast_call = None
        self.inference.end()
        if self.installed.stale:
            self.installed.put_on()
        if not self.whole.axes:
            if call.staged:
                self.copies.wait()
                fast.put_all(call.staged)
        elif call.place is not None:
            self.steps.keep(call)
        else:
            call.staged = merge(call.staged, self.mesh)
            for staged in call.staged:
                staged.forward, staged.idle = self.outbox.forwards, call.idle
            self.outbox.forwards += 1
            self.outbox.waiting += call.staged
            for form, claim in call.claims.items():
                self.outbox.claims.setdefault(form, claim)
            if self.lockstep or call.crossed:
                self.outbox.point(edited=call.edited or any(b.selection is not None for b in self.bounds if b.enabled))
            elif self.outbox.waiting and not self._told:
                self._told = True
                logger.info("ranks need not run in lockstep here: captures wait for fm.flush() or the end of capture")
        if torch.is_grad_enabled():
            self.backward.arm_outputs(call, output)
        call.staged, call.claims = [], {}
        call.drop_inputs()
        if call.place is None and self.missed.looks(call.index):
            self.missed.after_call(module, output)

    @property
    def lockstep(self) -> bool:
        """Whether all ranks are known to run the same forwards now."""
        return self.steps.place is not None or self.engines.lockstep

    def stage(self, call: ActiveCall, staged: Staged) -> None:
        call.staged.append(staged)

    def keep_on(self, layout: Layout | None) -> torch.device | None:
        """Where a staged value waits: on the user's device at once if nothing has to move between ranks."""
        moves = layout is None or bool(layout.moving_axes) or self.whole is not self.mesh
        return None if moves and self.whole.axes else self.device
