"""``fm.stream``: a harvest's rows without a disk, each once, the same on every rank; and what ``dry_run`` tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engines
import models
import pytest
import torch
from test_harvest import UNEVEN, batches, by_hand, kept
from torch import Tensor
from worlds import run_world

from flex_model import FlexModel
from flex_model.errors import FlexModelError, HarvestError

SITES = ["layers.0", "layers.1.mlp.act"]


def _stream(engine: str, **options: Any) -> list[dict[str, list[Any]]]:
    placed = models.net() if engine == "none" else engines.place(engine, models.net()).model
    rows = FlexModel(placed).stream(batches(), SITES, exclude_tokens=(5,), **options)
    return [{name: value.tolist() for name, value in batch.items()} for batch in rows]


def whole(given: list[dict[str, list[Any]]], name: str) -> Tensor:
    return torch.cat([torch.tensor(batch[name]) for batch in given])


@pytest.mark.parametrize("engine", ["none", "ddp", "fsdp2", "tp", "fairscale"])
def test_rows_once_and_shuffled(engine: str) -> None:
    options = {"batch_size": 8, "buffer": 20, "drop_last": False, "seed": 3}
    given = [_stream(engine, **options)] if engine == "none" else run_world(2, lambda: _stream(engine, **options))
    want = by_hand(models.net(), batches(), SITES, lambda b: kept(b["ids"], (5,)))
    ids = torch.cat([b["ids"][kept(b["ids"], (5,))] for b in batches()])
    for mine in given:
        assert [len(batch["token_ids"]) for batch in mine[:-1]] == [8] * (len(ids) // 8)
        assert whole(mine, "token_ids").tolist() != ids.tolist()
        got = torch.cat([whole(mine, name) for name in SITES] + [whole(mine, "token_ids")[:, None]], 1)
        rows = torch.cat([*want.values(), ids[:, None]], 1)
        assert torch.allclose(_sorted(got), _sorted(rows), atol=1e-5)
        assert whole(mine, "token_ids").tolist() == whole(given[0], "token_ids").tolist()


def _sorted(rows: Tensor) -> Tensor:
    return rows[rows[:, 0].argsort()]


def test_a_function_of_the_seed() -> None:
    one, again, other = (_stream("none", batch_size=8, buffer=30, seed=seed) for seed in (1, 1, 2))
    assert one == again != other
    assert all(len(batch["token_ids"]) == 8 for batch in one)


def test_hooks_are_off_in_between() -> None:
    fm = FlexModel(models.net())
    for _ in fm.stream(batches(), "layers.0", batch_size=8, buffer=8):
        assert not fm.hooks()
        fm(models.tokens())


def test_a_buffer_smaller_than_a_batch() -> None:
    with pytest.raises(FlexModelError, match="buffer"):
        list(FlexModel(models.net()).stream(batches(), "layers.0", batch_size=8, buffer=7))


def _dry(path: Path) -> tuple[Any, ...]:
    fm = FlexModel(engines.place("tp", models.net()).model)
    told = fm.harvest(batches(), SITES, path, dtype="float16", dry_run=True)
    return list(told.sites), told.steps, told.row_bytes, told.rows, told.bytes, str(told), path.exists()


def test_dry_run(tmp_path: Path) -> None:
    path = tmp_path / "acts"
    for sites, steps, row, rows, size, text, there in run_world(2, _dry, path):
        first = sum(b * s for b, s in UNEVEN[:3]) / 3
        assert sites == SITES and steps == 4 and row == 2 * (8 + 16)
        assert rows == round(4 * first) and size == rows * row and not there
        assert f"{rows:,} rows of 2 sites" in text and "free" in text


def test_dry_run_without_a_length(tmp_path: Path) -> None:
    told = FlexModel(models.net()).harvest(iter(batches()), SITES, tmp_path / "acts", dry_run=True)
    assert told.steps is None and told.bytes is None and "how many rows is not known" in str(told)
    with pytest.raises(HarvestError, match="no batches"):
        FlexModel(models.net()).harvest([], SITES, tmp_path / "acts", dry_run=True)
