"""torch.distributed.pipelining: a schedule runs the stages of a rank, microbatch by microbatch.

A stage knows its module, but a module knows nothing of its stage, and a schedule tells nobody when a step begins and
ends. So the few methods in which that happens are watched, on torch's classes, once a FlexModel exists.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, ClassVar
from weakref import WeakSet, ref

import torch
import torch.distributed as dist
from torch import nn

from flex_model.engines.engine import Conductor, Engine, Held
from flex_model.engines.schedule import Conductors, watch
from flex_model.layout.mesh import Axis

__all__ = ["PipeliningEngine", "stages_made"]

_FILE = "torch.distributed.pipelining.stage"
_stages: WeakSet[Any] = WeakSet()
_conductors = Conductors()
_made = -1  # stages seen; none are looked for before torch's file is there


class PipeliningEngine(Engine):
    """The module is run by a ``PipelineStage``; or it is a ``ModuleList`` of such modules, the stages of this rank."""

    name: ClassVar[str] = "pipelining"
    plain_names: ClassVar[bool] = False

    def __init__(self, module: nn.Module, stages: Sequence[Any]) -> None:
        super().__init__(module)
        self._stages = [ref(s) for s in sorted(stages, key=lambda s: s.stage_index)]

    @classmethod
    def find(cls, module: nn.Module) -> PipeliningEngine | None:
        if not stages_made():
            return None
        mine = [module, *(module.children() if isinstance(module, (nn.ModuleList, nn.ModuleDict)) else ())]
        # a module that was staged again, under another schedule, belongs to the stage made last
        found = {s.stage_index: s for s in _stages if any(s.submod is m for m in mine)}
        return cls(module, list(found.values())) if found else None

    @property
    def alive(self) -> bool:
        return all(s() is not None for s in self._stages)

    @property
    def stages(self) -> list[Any]:
        return [stage for s in self._stages if (stage := s()) is not None]

    @property
    def axes(self) -> list[Axis]:
        group = self.stages[0].group
        return [Axis("pp", "stage", tuple(dist.get_process_group_ranks(group or dist.group.WORLD)))]

    @property
    def parts(self) -> Mapping[int, nn.Module]:
        return {s.stage_index: s.submod for s in self.stages}

    @property
    def held(self) -> Iterable[Held]:
        return [Held(s.submod, s.submod, answer=partial(_nothing, ref(s))) for s in self.stages]

    @property
    def lockstep(self) -> bool:
        return False  # a stage's module called by hand: the others may be called later, or never

    @classmethod
    def listen(cls, conductor: Conductor) -> None:
        _conductors.add(conductor)


def stages_made() -> int:
    """How many stages were made so far; the first call looks for those that are there already."""
    global _made
    if _FILE in sys.modules and _made < 0:
        _made = 0
        _watch()
    return max(_made, 0)


def _note(stage: Any) -> None:
    global _made
    _stages.add(stage)
    _made += 1


def _nothing(stage: Any, args: Any, kwargs: Any) -> Any:
    """What a stage hands on of a microbatch that was stopped: of the shapes that the next one waits for, and NaN."""
    made = stage()
    metas = made._stage_meta.outputs if hasattr(made, "_stage_meta") else made.get_outputs_meta()
    out = tuple(
        torch.full(m.shape, float("nan") if m.dtype.is_floating_point else 0, dtype=m.dtype, device=made.device)
        for m in metas
    )
    return out[0] if len(out) == 1 else out


def _watch() -> None:
    from torch.distributed.pipelining import schedules, stage

    base = stage._PipelineStageBase
    for there in gc.get_objects():
        if issubclass(type(there), base):
            _note(there)
    _note_new(base)
    watch(schedules.PipelineScheduleSingle, "step", _step)
    watch(schedules.PipelineScheduleMulti, "step", _step)
    watch(base, "forward_one_chunk", _forward)
    watch(base, "backward_one_chunk", _backward)
    watch(base, "backward_weight_one_chunk", _backward)


def _note_new(base: Any) -> None:
    init = base.__init__

    @wraps(init)
    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        _note(self)

    base.__init__ = noted


@contextmanager
def _step(schedule: Any, *_: Any, **__: Any) -> Iterator[None]:
    stages = getattr(schedule, "_stages", None) or [schedule._stage]
    count, backward = schedule._n_microbatches, schedule._has_backward
    divide = count if schedule.scale_grads else 1
    _conductors.look()
    with _conductors.inside([s.submod for s in stages], lambda c: c.step(count, divide=divide, backward=backward)):
        yield


@contextmanager
def _forward(stage: Any, fwd_chunk_id: int, *_: Any, **__: Any) -> Iterator[None]:
    with _conductors.inside([stage.submod], lambda c: c.forward(stage.stage_index, fwd_chunk_id)):
        yield


@contextmanager
def _backward(stage: Any, bwd_chunk_id: int, *_: Any, **__: Any) -> Iterator[None]:
    concerned = [stage.submod] if stage.has_backward else []
    with _conductors.inside(concerned, lambda c: c.backward(stage.stage_index, bwd_chunk_id)):
        yield
