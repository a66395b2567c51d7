"""``fm.harvest``: the rows of a store equal plain hooks on one process, in order, whoever wrote them; and nothing moves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import engines
import models
import pytest
import torch
import torch.distributed as dist
from pipelines import Traffic
from test_families import RANKS, place, run, saved
from torch import Tensor, nn
from worlds import run_world

from flex_model import FlexModel
from flex_model.errors import FlexModelError, HarvestError
from flex_model.store import ActivationStore

NOT_ROWS = {"", "layers", "layers.0", "layers.1"}


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
