"""``fm.harvest``: a store's rows equal plain hooks on one process, in order, whoever wrote them; and nothing moves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import engines
import models
import pytest
import torch
from pipelines import Traffic
from test_families import RANKS, place, run, saved
from torch import Tensor, nn
from worlds import run_world

from flex_model import FlexModel
from flex_model.store import ActivationStore

EVEN = ((4, 6), (3, 6), (1, 4), (2, 8))  # lengths that torch's sequence parallelism can run over two ranks
UNEVEN = ((4, 6), (3, 6), (1, 5), (2, 7))


def batches(sizes: Sequence[tuple[int, int]] = UNEVEN, vocabulary: int = 32) -> list[Any]:
    """Samples that do not divide over ranks, or are fewer, and several lengths."""
    draw = torch.Generator().manual_seed(3)
    return [{"ids": torch.randint(0, vocabulary, size, generator=draw)} for size in sizes]


def kept(ids: Tensor, exclude: Sequence[int], mask: Tensor | None = None) -> Tensor:
    keep = ~torch.isin(ids, torch.tensor(exclude)) if exclude else torch.ones_like(ids, dtype=torch.bool)
    return keep if mask is None else keep & mask.bool()


def by_hand(plain: nn.Module, data: Iterable[dict[str, Tensor]], names: Sequence[str], keep: Any) -> dict[str, Tensor]:
    """Rows of plain torch hooks."""
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    now: dict[str, Any] = {}

    def take(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            rows[name].append(value.reshape(*now["ids"].shape, *value.shape[value.dim() - 1 :])[now["keep"]].clone())

        return hook

    handles = [plain.get_submodule(name).register_forward_hook(take(name)) for name in names]
    with torch.no_grad():
        for batch in data:
            now["ids"] = batch.get("ids", batch.get("input_ids"))
            now["keep"] = keep(batch)
            plain(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found) for name, found in rows.items()}


def differences(path: Path, want: dict[str, Tensor], tolerance: float = 1e-5) -> list[str]:
    store = ActivationStore(path)
    store.verify()
    found = []
    for name, rows in want.items():
        got = store[name].torch()
        if got.shape != rows.shape or (got - rows).double().norm() > tolerance * rows.double().norm():
            found.append(f"{name}: {tuple(got.shape)} for {tuple(rows.shape)}")
    return found


# -- engines of torch's ------------------------------------------------------------------------------------------
def of_engine(engine: str) -> list[Any]:
    return batches(EVEN if engine.endswith("sp") else UNEVEN)


def _harvest(engine: str, path: Path) -> int:
    placed = engines.place(engine, models.net())
    fm = FlexModel(placed.model)
    names = [n for n in fm.wrapped_module_names if n not in ("", "layers")]
    done = fm.harvest(of_engine(engine), names, path, exclude_tokens=(5, 6), commit_every=2)
    return done.rows


@pytest.mark.parametrize("engine", ["none", *engines.TWO_RANKS, *engines.FOUR_RANKS, *engines.FAIRSCALE_TWO_RANKS])
def test_every_module(engine: str, tmp_path: Path) -> None:
    path = tmp_path / "acts"
    size = 1 if engine == "none" else 4 if engine in engines.FOUR_RANKS else 2
    plain = models.net()
    names = [n for n, _ in plain.named_modules() if n not in ("", "layers")]
    data = of_engine(engine)
    want = by_hand(plain, data, names, lambda b: kept(b["ids"], (5, 6)))
    want["token_ids"] = torch.cat([b["ids"][kept(b["ids"], (5, 6))] for b in data])
    if engine == "none":
        rows = [FlexModel(models.net()).harvest(data, names, path, exclude_tokens=(5, 6)).rows]
    else:
        rows = run_world(size, _harvest, engine, path)
    assert rows == [len(want["token_ids"])] * size
    assert not differences(path, want)


# -- transformers: places, padding, fused and uneven projections --------------------------------------------------
FAMILIES = [
    *((e, "llama") for e in ("none", "ddp", "fsdp2", "tp", "tp_fsdp", "hsdp")),
    *((e, "qwen3_moe") for e in ("tp", "ep_tp", "ep_fsdp")),
    ("fsdp2", "gpt2"),
    ("none", "opt"),
]


def padded(vocabulary: int = 66) -> list[dict[str, Tensor]]:
    data = []
    for i, batch in enumerate(batches(vocabulary=vocabulary)):
        mask = torch.ones_like(batch["ids"])
        if i == 0:
            mask[1, 4:] = 0
        data.append({"input_ids": batch["ids"], "attention_mask": mask})
    return data


def _places(fm: FlexModel) -> list[Any]:
    return [fm.at("resid_post"), fm.at("z", 1), fm.at("z", 0, head=2), fm.at("mlp_out", 0)]


def _of_transformers(engine: str, family: str, folder: Path, path: Path) -> int:
    fm = FlexModel(place(engine, models.make(family), folder).model)
    done = fm.harvest(padded(), _places(fm), path, dtype=torch.float64)
    return done.rows


@pytest.mark.parametrize(("engine", "family"), FAMILIES)
def test_transformers(engine: str, family: str, tmp_path: Path) -> None:
    folder, path = saved(models.make(family), tmp_path / "model", engine), tmp_path / "acts"
    rows = run(engine, _of_transformers, family, folder, path)
    plain = FlexModel(models.make(family))
    want: dict[str, list[Tensor]] = {}
    for batch in padded():
        with torch.no_grad():
            acts = plain.capture(*_places(plain)).run(**batch)
        for key in acts:
            value = acts[key].reshape(*batch["input_ids"].shape, *acts[key].shape[2 if acts[key].dim() > 2 else 1 :])
            want.setdefault(str(key), []).append(value[batch["attention_mask"].bool()].double())
    assert rows == [len(torch.cat(want["@resid_post.0"]))] * RANKS[engine]
    assert not differences(path, {k: torch.cat(v) for k, v in want.items()})


# -- what moves ------------------------------------------------------------------------------------------------
def _traffic(engine: str, site: str, path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Operations between ranks in 14 forwards, and how many more a harvest of 31 steps has than one of 17: between
    steps 16 and 32 ranks do not meet."""
    placed = engines.place(engine, models.net())
    fm = FlexModel(placed.model)
    data = batches([(4, 6)] * 31)
    with Traffic() as plain, torch.no_grad():
        for batch in data[:14]:
            placed.model(placed.mine(batch["ids"]))
    made = []
    for steps in (17, 31):
        with Traffic() as traffic:
            fm.harvest(data[:steps], site, path / str(steps), stop=False, commit_every=99)
        made.append(traffic.counts)
    return dict(plain.counts), dict(made[1] - made[0])


SITES = [("tp", "layers.0.mlp.act"), ("tp", "layers.0.norm"), ("ddp", "norm"), ("sp", "layers.1")]


@pytest.mark.parametrize(("engine", "site"), SITES)
def test_nothing_moves(engine: str, site: str, tmp_path: Path) -> None:
    for plain, more in run_world(2, _traffic, engine, site, tmp_path):
        print(f"{engine}, {site}: 14 forwards {plain}, 14 more steps of a harvest {more}")
        assert more == plain
