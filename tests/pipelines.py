"""The plain test model cut into pipeline stages, and schedules that run it."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from models import Net
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
)
from torch.utils._python_dispatch import TorchDispatchMode

SCHEDULES = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "bfs": ScheduleLoopedBFS,
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}
SINGLE = ("gpipe", "1f1b")


class Slice(nn.Module):
    """What one stage holds of a ``Net``, under the names of the whole."""

    def __init__(self, whole: Net, stage: int, stages: int) -> None:
        super().__init__()
        count = len(whole.layers)
        low, high = stage * count // stages, (stage + 1) * count // stages
        self.emb = copy.deepcopy(whole.emb) if stage == 0 else None
        self.layers = nn.ModuleDict({str(i): copy.deepcopy(whole.layers[i]) for i in range(low, high)})
        self.norm = copy.deepcopy(whole.norm) if stage == stages - 1 else None
        self.head = copy.deepcopy(whole.head) if stage == stages - 1 else None

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.emb is None else self.emb(x)
        for layer in self.layers.values():
            x = layer(x)
        return x if self.norm is None else self.head(self.norm(x))


def loss(output: Tensor, target: Any = None) -> Tensor:
    return output.float().pow(2).mean()


class Pipe:
    """Stages of ``whole`` on this rank, the module to wrap, and how to run it.

    ``group``: the ranks of the pipeline, the default group unless given.
    """

    def __init__(
        self,
        whole: Net,
        schedule: str,
        *,
        microbatches: int = 4,
        scale_grads: bool = True,
        group: Any = None,
        per_rank: int = 2,
        prepare: Any = None,
    ) -> None:
        self.kind, self.microbatches, self.scale_grads, self.group = schedule, microbatches, scale_grads, group
        ranks, me = dist.get_world_size(group), dist.get_rank(group)
        per_rank = 1 if schedule in SINGLE else per_rank
        self.stages = ranks * per_rank
        self.indices = [me + i * ranks for i in range(per_rank)]
        parts = [Slice(whole, i, self.stages) for i in self.indices]
        self.parts = [part if prepare is None else prepare(part) for part in parts]
        self.module = self.parts[0] if per_rank == 1 else nn.ModuleList(self.parts)

    def schedule(self, modules: list[nn.Module] | None = None) -> Any:
        made = [
            PipelineStage(m, i, self.stages, torch.device("cpu"), group=self.group)
            for i, m in zip(self.indices, modules or self.parts, strict=True)
        ]
        cls = SCHEDULES[self.kind]
        stages: Any = made[0] if self.kind in SINGLE else made
        return cls(stages, self.microbatches, loss_fn=loss, scale_grads=self.scale_grads)


class Traffic(TorchDispatchMode):
    """How often each operation of torch.distributed ran."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func._schema.name.removeprefix("c10d::").rstrip("_")] += 1
        return func(*args, **(kwargs or {}))


def step(schedule: Any, batch: Tensor, train: bool = True) -> Any:
    """One script for all ranks: the first stage takes the batch, the last gives the output and the losses."""
    stages = getattr(schedule, "_stages", None) or [schedule._stage]
    args = (batch,) if any(s.is_first for s in stages) else ()
    keywords = {"target": batch} if any(s.is_last for s in stages) else {}
    if train:
        return schedule.step(*args, **keywords)
    with torch.no_grad():
        return schedule.eval(*args, **keywords)
