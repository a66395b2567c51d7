"""Every named module of many Hugging Face families under every engine: values and gradients equal the oracle's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import models
import parity
import pytest
import torch
import torch.distributed as dist
from engines import Placed
from oracle import Count
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from worlds import run_world

from flex_model import FlexModel

SIZES = {
    "tp": {"tp_size": 2},
    "tp_fsdp": {"tp_size": 2, "fsdp_size": 2},
    "hsdp": {"fsdp_size": 2, "dp_replicate_size": 2},
    "ep_tp": {"tp_size": 2, "ep_size": 2},  # the ranks of one batch share the experts
    "ep_fsdp": {"fsdp_size": 2, "ep_size": 2},  # each rank has a batch of its own
    "ep_tp_fsdp": {"tp_size": 2, "fsdp_size": 2, "ep_size": 2},
    "ep_over_tp_fsdp": {"tp_size": 2, "fsdp_size": 2, "ep_size": 4},
    "ep_over_half_fsdp": {"fsdp_size": 4, "ep_size": 2},
    "ep_hsdp": {"fsdp_size": 2, "dp_replicate_size": 2, "ep_size": 2},
}
RANKS = {"none": 1, "ddp": 2, "fsdp2": 2, "tp": 2, "ep_tp": 2, "ep_fsdp": 2}
RANKS |= dict.fromkeys(("tp_fsdp", "hsdp", "ep_tp_fsdp", "ep_over_tp_fsdp", "ep_over_half_fsdp", "ep_hsdp"), 4)

# Engines that cannot run a family themselves, and why.
CANNOT = {("tp", f): "transformers has no tp_plan for it" for f in ("gpt2", "opt", "bert", "t5")}

CASES = [
    *((e, f) for e in ("none", "ddp", "fsdp2", "tp") for f in models.FAMILIES if (e, f) not in CANNOT),
    ("tp_fsdp", "llama"),
    ("tp_fsdp", "qwen3_moe"),
    ("hsdp", "llama"),
]


def stacks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model: the members of its outermost lists."""
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    return [b for n, m in lists.items() if not any(n.startswith(f"{o}.") for o in lists) for b in m]


def place(engine: str, plain: nn.Module, path: Path) -> Placed:
    """The plain model under an engine; transformers' own engines load it from ``path``."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if engine != "none" else (1, 0)
    if engine in SIZES:
        from transformers.distributed import DistributedConfig

        config = DistributedConfig(**SIZES[engine])
        model = type(plain).from_pretrained(path, distributed_config=config, attn_implementation="eager")
        tp = SIZES[engine].get("tp_size", 1)
        return Placed(model, world // tp, rank // tp)
    model = copy.deepcopy(plain)
    if engine == "ddp":
        return Placed(nn.parallel.DistributedDataParallel(model), world, rank)
    if engine == "fsdp2":
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
        for block in stacks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return Placed(model, world, rank)


def unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def saved(plain: nn.Module, folder: Path, engine: str) -> Path:
    if engine in SIZES:
        plain.save_pretrained(folder)
    return folder


def compare(
    engine: str,
    family: str,
    path: Path,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-5,
    experts: str | None = None,
) -> Count:
    """``experts``: transformers' implementation of mixtures of experts, on both sides."""
    plain = models.make(family).to(dtype)
    placed = place(engine, plain, path)
    if experts is not None:
        plain.set_experts_implementation(experts)
        unwrapped(placed.model).set_experts_implementation(experts)
    full = models.inputs(family)
    mine = {k: placed.mine(v) for k, v in full.items()}
    return parity.compare(
        placed.model,
        plain,
        lambda m: parity.square(m(**mine)),
        lambda m: parity.square(m(**full)),
        tolerance=tolerance,
        rows=family in models.MIXTURES,
    )


def run(engine: str, function: Callable[..., object], *args: object) -> list[object]:
    return [function(engine, *args)] if engine == "none" else run_world(RANKS[engine], function, engine, *args)


@pytest.mark.parametrize(("engine", "family"), CASES)
def test_parity(engine: str, family: str, tmp_path: Path) -> None:
    path = saved(models.make(family), tmp_path, engine)
    counts = run(engine, compare, family, path)
    print(f"{family}/{engine}: {counts[0]}")
    for count in counts:
        assert not count.wrong and not count.refused


@pytest.mark.parametrize(("engine", "family"), CANNOT)
def test_what_an_engine_cannot_run(engine: str, family: str) -> None:
    print(f"{family}/{engine}: not run, {CANNOT[engine, family]}")
    assert not models.make(family)._tp_plan


@pytest.mark.parametrize("engine", ["tp", "fsdp2"])
def test_bfloat16(engine: str, tmp_path: Path) -> None:
    """Sums in another order round differently, by a few units in the last of 8 bits."""
    path = saved(models.make("llama").to(torch.bfloat16), tmp_path, engine)
    for count in run(engine, compare, "llama", path, torch.bfloat16, 3e-2):
        print(f"llama in bfloat16/{engine}: {count}")
        assert not count.wrong and not count.refused


def parameters(engine: str, path: Path) -> list[str]:
    plain = models.make("qwen3_moe")
    fm = FlexModel(place(engine, plain, path).model)
    return [n for n, p in plain.named_parameters() if not torch.equal(fm.get_module_parameter(n, p.shape), p)]


@pytest.mark.parametrize("engine", ["tp", "tp_fsdp", "fsdp2", "ep_tp", "ep_over_tp_fsdp", "ep_over_half_fsdp"])
def test_full_parameters(engine: str, tmp_path: Path) -> None:
    """Also of experts, whose gate and up projections are packed in one parameter and sharded each for itself."""
    path = saved(models.make("qwen3_moe"), tmp_path, engine)
    assert run(engine, parameters, path) == [[]] * RANKS[engine]
