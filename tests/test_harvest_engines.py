"""``fm.harvest`` under Megatron-core, pipelines, context parallelism, sums that are still to be made, and loaders of
each rank's own: rows in the order of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import context
import engines
import models
import pytest
import torch
import torch.distributed as dist
from pipelines import Pipe, step
from test_harvest import batches, by_hand, differences
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleOutput,
    RowwiseParallel,
    parallelize_module,
)
from worlds import run_world

from flex_model import FlexModel, ZigZag


def everything(batch: Any) -> Tensor:
    ids = batch["ids"] if isinstance(batch, dict) else batch
    return torch.ones_like(ids, dtype=torch.bool)


def whole(names: list[str], data: list[dict[str, Tensor]], plain: nn.Module) -> dict[str, Tensor]:
    want = by_hand(plain, data, names, everything)
    want["token_ids"] = torch.cat([b["ids"].flatten() for b in data])
    return want


# -- Megatron-core: [s, b, h] ------------------------------------------------------------------------------------
MEGATRON = ("decoder.layers.*", "decoder.layers.1.mlp.linear_fc1", "decoder.layers.0.self_attention.linear_qkv")


def _megatron(which: str, ranks: int, folder: Path) -> tuple[list[str], int]:
    from megatron_cpu import Spread
    from test_megatron import MODELS, pair, positions, tokens, wrapped

    spread = Spread(tp=2)
    changes, options = MODELS[which]
    sharded, plain = pair(spread, changes, options)
    data = [tokens(*size) for size in ((4, 4), (4, 6), (3, 4), (1, 6))]  # as long as wide first: which dim is which?
    given = [{"input_ids": ids, "position_ids": positions(ids), "attention_mask": None} for ids in data]
    fm = FlexModel(wrapped(sharded, "torch DDP" if ranks == 4 else "none"))
    fm.harvest(given, MEGATRON, folder / "acts", commit_every=3)
    names = [n for n in fm.wrapped_module_names if n in MEGATRON[1:] or n in ("decoder.layers.0", "decoder.layers.1")]
    rows: dict[str, list[Tensor]] = {name: [] for name in names}

    def take(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            rows[name].append(value.transpose(0, 1).flatten(0, 1))

        return hook

    with spread.alone(), torch.no_grad():
        for name in names:
            plain.get_submodule(name).register_forward_hook(take(name))
        for ids in data:
            plain(ids, positions(ids), None)
    return differences(folder / "acts", {name: torch.cat(found) for name, found in rows.items()}), len(names)


@pytest.mark.parametrize(("ranks", "which"), [(2, "tp"), (2, "sp"), (4, "tp"), (4, "sp")])
def test_megatron(ranks: int, which: str, tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    assert run_world(ranks, _megatron, which, ranks, tmp_path) == [([], 4)] * ranks


# -- pipelines ---------------------------------------------------------------------------------------------------
STAGED = ["emb", "layers.0", "layers.1.mlp.act", "layers.3", "norm", "head"]


def _pipeline(schedule: str, path: Path) -> int:
    pipe = Pipe(models.net(layers=4), schedule)
    run = pipe.schedule()
    fm = FlexModel(pipe.module)
    data = batches([(8, 6)] * 3)
    done = fm.harvest(data, STAGED, path, forward=lambda ids: step(run, ids, train=False), commit_every=2)
    return done.rows


@pytest.mark.parametrize("schedule", ["gpipe", "interleaved"])
def test_pipelines(schedule: str, tmp_path: Path) -> None:
    path, data = tmp_path / "acts", batches([(8, 6)] * 3)
    assert run_world(2, _pipeline, schedule, path) == [3 * 48] * 2
    assert not differences(path, whole(STAGED, data, models.net(layers=4)))


# -- context parallelism -------------------------------------------------------------------------------------------
SITES = ["emb", "layers.0.norm", "layers.1.mlp.up", "layers.1"]


def _context(names: tuple[str, ...], order: Any, path: Path) -> int:
    placed = context.place(names, order)
    fm = FlexModel(placed.model, mesh=placed.mesh)

    def forward(ids: Tensor) -> None:
        where = torch.arange(context.LENGTH).expand(len(ids), context.LENGTH)
        cp = placed.mesh["cp"]
        sizes = [context.LENGTH // cp.size()] * cp.size()
        mine = [context.my_part(x, order(1), sizes, cp.get_local_rank()).contiguous() for x in (ids, where)]
        fm(*mine)

    return fm.harvest(context_data(), SITES, path, forward=forward).rows


def context_data() -> list[Tensor]:
    return [b["ids"] for b in batches([(4, context.LENGTH), (3, context.LENGTH), (1, context.LENGTH)])]


@pytest.mark.parametrize("order", [ZigZag, Shard])
@pytest.mark.parametrize("names", [("cp",), ("dp", "cp"), ("cp", "tp")], ids=" x ".join)
def test_context_parallel(names: tuple[str, ...], order: Any, tmp_path: Path) -> None:
    path, plain = tmp_path / "acts", context.plain()
    rows = run_world(2 ** len(names), _context, names, order, path)
    assert rows == [8 * context.LENGTH] * 2 ** len(names)
    got: dict[str, list[Tensor]] = {name: [] for name in SITES}
    for name in SITES:
        keep = got[name].append
        plain.get_submodule(name).register_forward_hook(lambda m, a, out, keep=keep: keep(out.flatten(0, 1)))
    with torch.no_grad():
        for ids in context_data():
            plain(ids, torch.arange(context.LENGTH).expand_as(ids))
    assert not differences(path, {name: torch.cat(found) for name, found in got.items()})


# -- sums that are still to be made --------------------------------------------------------------------------------
def _partial(path: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = models.net(hidden=18)
    down = RowwiseParallel(output_layouts=Partial(), use_local_output=False)
    mlp = PrepareModuleOutput(output_layouts=Partial(), desired_output_layouts=Replicate())
    plan = {"layers.*.mlp.up": ColwiseParallel(), "layers.*.mlp.down": down, "layers.*.mlp": mlp}
    parallelize_module(model, mesh, plan)
    FlexModel(model).harvest(batches(), ["layers.0.mlp.down", "layers.1.mlp.down"], path)


@pytest.mark.parametrize("ranks", [2, 3])
def test_sums(ranks: int, tmp_path: Path) -> None:
    run_world(ranks, _partial, tmp_path / "acts")
    want = whole(["layers.0.mlp.down", "layers.1.mlp.down"], batches(), models.net(hidden=18))
    assert not differences(tmp_path / "acts", want)


# -- one site on many ranks, loaders of each rank's own ------------------------------------------------------------
def _one_site(path: Path) -> int:
    placed = engines.place("tp", models.net())
    done = FlexModel(placed.model).harvest(batches(), "layers.1", path)
    del done
    return sum(f.stat().st_size for f in path.glob(f"segments/*-{dist.get_rank():05d}/*/*") if "layers" in str(f))


def test_ranks_with_the_same_values_share_the_writing(tmp_path: Path) -> None:
    sizes = run_world(2, _one_site, tmp_path / "acts")
    assert sizes[0] == pytest.approx(sizes[1], rel=0.3) and min(sizes) > 0
    assert not differences(tmp_path / "acts", whole(["layers.1"], batches(), models.net()))


def _own(engine: str, path: Path) -> int:
    placed = engines.place(engine, models.net())
    fm = FlexModel(placed.model)
    lengths = (3, 1)[placed.index]  # this rank's loader is longer than the other's
    data = [b for b in batches()[placed.index :: placed.parts]][:lengths] + batches()[:1] * (1 - placed.index)
    return fm.harvest(data, ["layers.0", "norm"], path, own_batches=True).rows


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_own_batches(engine: str, tmp_path: Path) -> None:
    path, every = tmp_path / "acts", batches()
    first, second = [every[0], every[2], every[0]], [every[1]]
    order = [first[0], second[0], first[1], first[2]]
    assert run_world(2, _own, engine, path) == [sum(b["ids"].numel() for b in order)] * 2
    assert not differences(path, whole(["layers.0", "norm"], order, models.net()))


# -- rows that are samples -------------------------------------------------------------------------------------------
def _samples(engine: str, path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    if engine == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    labels = torch.arange(5)
    data = [{"input": torch.linspace(-1, 1, 20).view(5, 4) * (i + 1), "label": labels + 10 * i} for i in range(3)]
    FlexModel(model).harvest(data, "1", path, columns=["label"])


def test_samples(tmp_path: Path) -> None:
    from flex_model.store import ActivationStore

    run_world(1, _samples, "none", tmp_path / "one")
    run_world(2, _samples, "ddp", tmp_path / "two")
    one, two = ActivationStore(tmp_path / "one"), ActivationStore(tmp_path / "two")
    assert torch.equal(one["1"].torch(), two["1"].torch()) and one["1"].shape == (15, 8)
    labels = [*range(5), *range(10, 15), *range(20, 25)]
    assert one.columns["label"][:].tolist() == two.columns["label"][:].tolist() == labels
