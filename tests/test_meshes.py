"""Meshes of several axes with a pipeline in them: PP with DDP, FSDP2, TP, and all together over eight ranks."""

from __future__ import annotations

from typing import Any

import engines
import models
import parity
import pytest
import torch.distributed as dist
from oracle import Count, relative_error
from pipelines import Pipe, loss, step
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from worlds import run_world

from flex_model import FlexModel, HookFunction

LAYERS, BATCH = 4, 8
SHAPES = {
    "pp_tp": {"pp": 2, "tp": 2},
    "pp_ddp": {"pp": 2, "dp": 2},
    "pp_fsdp": {"pp": 2, "dp": 2},
    "pp_ddp_tp": {"pp": 2, "dp": 2, "tp": 2},
    "pp_fsdp_tp": {"pp": 2, "dp": 2, "tp": 2},
}


def tokens() -> Tensor:
    return models.tokens(batch=BATCH)


class Laid:
    """The plain model on a mesh: its pipeline, and this rank's part of the batch."""

    def __init__(self, kind: str, plain: nn.Module, schedule: str) -> None:
        sizes = SHAPES[kind]
        self.mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        self.parts = sizes.get("dp", 1)
        index = self.mesh["dp"].get_local_rank() if "dp" in sizes else 0
        self.batch = tokens().chunk(self.parts)[index]

        def prepare(part: nn.Module) -> nn.Module:
            if "tp" in sizes:
                there = {n for n, m in part.named_modules() if m is not None}
                style = {k: v for k, v in engines.plan("tp").items() if "*" in k or k in there}
                parallelize_module(part, self.mesh["tp"], style)
            if "fsdp" in kind:
                for layer in part.layers.values():
                    fully_shard(layer, mesh=self.mesh["dp"])
                return fully_shard(part, mesh=self.mesh["dp"])
            if "ddp" in kind:
                keywords: dict[str, Any] = {"device_mesh": self.mesh["dp"]} if "tp" in sizes else {}
                group = self.mesh["dp"].get_group()
                return nn.parallel.DistributedDataParallel(part, **(keywords or {"process_group": group}))
            return part

        # DDP over TP takes sharded weights out of parameters(), where torch's scale_grads looks for them: it leaves
        # their gradients undivided, with or without hooks. So there nothing is divided.
        self.divided = kind != "pp_ddp_tp"
        self.times = 1 if self.divided else 2
        self.pipe = Pipe(
            plain,
            schedule,
            microbatches=2,
            scale_grads=self.divided,
            group=self.mesh["pp"].get_group(),
            prepare=prepare,
        )


def full(grad: Tensor) -> Tensor:
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def _every_module(kind: str, schedule: str) -> Count:
    plain = models.net(layers=LAYERS)
    laid = Laid(kind, plain, schedule)
    run, fm = laid.pipe.schedule(), FlexModel(laid.pipe.module)
    parameters = dict(fm.named_parameters())
    want = parity.whole_step(plain, lambda m: loss(m(tokens())) * laid.times)
    count, output = parity.compare_step(fm, want, lambda: step(run, laid.batch))
    assert relative_error(fm.full_output(output), plain(tokens())) < 1e-5
    count.wrong += _wrong(fm, parameters, plain)
    return count


def _wrong(fm: FlexModel, parameters: dict[str, Tensor], plain: nn.Module) -> list[str]:
    bad = []
    for name, grad in parity.full_gradients(fm, parameters).items():
        if not name.startswith("trainable_modules."):
            error = relative_error(grad, plain.get_parameter(name).grad)
            bad += [f"{name}: off by {error:.2g}"] if not error < 1e-5 else []
    return bad


def check(kind: str, schedule: str, ranks: int) -> None:
    for count in run_world(ranks, _every_module, kind, schedule, timeout=280):
        print(f"{kind.replace('_', ' x ')}, {schedule}: {count}")
        assert not count.wrong and not count.refused and count.tried == 110 + 20  # modules and parameters


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [
        ("pp_tp", "1f1b"),
        ("pp_ddp", "gpipe"),
        ("pp_ddp", "interleaved"),
        ("pp_fsdp", "1f1b"),
        ("pp_fsdp", "interleaved"),
    ],
)
def test_four_ranks(kind: str, schedule: str) -> None:
    check(kind, schedule, 4)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", ["pp_ddp_tp", "pp_fsdp_tp"])
def test_eight_ranks(kind: str) -> None:
    check(kind, "1f1b", 8)


# -- edits and trainable modules -----------------------------------------------------------------------------------
def mix(x: Tensor) -> Tensor:
    """Mixes across the sharded dim; within a microbatch the data axes' parts are mixed by the test below."""
    return (x - x.mean(-1, keepdim=True)).tanh() * 1.5


SITES = ("layers.0.mlp.act", "layers.1.mlp", "layers.3.mlp.act", "head")


def _edits(kind: str) -> list[str]:
    import copy

    import torch

    bad = []
    for run in ("every_rank", "one_rank", "sharded"):
        plain = models.net(layers=LAYERS)
        laid = Laid(kind, plain, "1f1b")
        fm = FlexModel(laid.pipe.module)
        schedule = laid.pipe.schedule()
        torch.manual_seed(4)
        probes = {
            n: nn.Linear(
                16 if n.endswith("act") else 32 if n == "head" else 8,
                16 if n.endswith("act") else 32 if n == "head" else 8,
            )
            for n in SITES
        }
        for name, probe in probes.items():
            fm.register_trainable_module(name.replace(".", "_"), copy.deepcopy(probe))
            key = name.replace(".", "_")
            plain.get_submodule(name).register_forward_hook(lambda m, a, o, probe=probe: mix(probe(o)))
            edit = lambda module, x, save_ctx, modules, key=key: mix(modules[key](x))  # noqa: E731
            fm.register_forward_hook(HookFunction(name, editing_function=edit, run=run, capture=False))
        parameters = dict(fm.named_parameters())
        step(schedule, laid.batch)
        loss(plain(tokens())).backward()
        bad += [f"{run}: {b}" for b in _wrong(fm, parameters, plain)]
        for name, probe in probes.items():
            mine = fm.trainable_modules[name.replace(".", "_")]
            for (label, p), q in zip(mine.named_parameters(), probe.parameters(), strict=True):
                error = relative_error(full(p.grad), q.grad)
                bad += [f"{run}: probe of {name}: {label} off by {error:.2g}"] if not error < 1e-5 else []
    return bad


@pytest.mark.parametrize("kind", ["pp_tp", "pp_ddp", "pp_fsdp"])
def test_edits(kind: str) -> None:
    for bad in run_world(4, _edits, kind):
        assert not bad
    print(f"{kind.replace('_', ' x ')}, edits with trainable modules: 3 exact of 3")
    assert dist.is_available()
