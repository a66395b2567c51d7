"""Batches from a store: every row once, in another order every epoch, and on from anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from flex_model.errors import StoreError
from flex_model.store import ActivationStore, RowDataset, StoredSite, StoreWriter

pytest.importorskip("numpy")
pytest.importorskip("ml_dtypes")
pytest.importorskip("xxhash")

ROWS = 1003


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    path = tmp_path_factory.mktemp("rows") / "acts"
    whole = torch.arange(ROWS)
    with StoreWriter.create(path, sites={"x": StoredSite((3,))}, columns={"ids": "int64"}) as writer:
        for step, ids in enumerate(whole.split(90)):
            writer.append(step, {"x": ids[:, None] + torch.arange(3) / 4}, columns={"ids": ids})
            writer.commit(step)
    return ActivationStore(path)


def data(store: ActivationStore, **more: Any) -> RowDataset:
    given = {"batch_size": 16, "columns": ["ids"], "block": 8, "buffer": 5, "drop_last": False, **more}
    return RowDataset(store, **given)


def ids(batches: Any) -> list[int]:
    """Of all batches, whose rows must belong together."""
    found = []
    for batch in batches:
        assert torch.equal(batch["ids"], batch["rows"])
        assert torch.equal(batch["x"], batch["ids"][:, None] + torch.arange(3) / 4)
        found += batch["ids"].tolist()
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_row_once(store: ActivationStore, ranks: int, workers: int) -> None:
    each, alone = [], []
    for rank in range(ranks):
        dataset = data(store, rank=rank, ranks=ranks)
        loader = DataLoader(dataset, batch_size=None, num_workers=workers)
        each.append(ids(loader))
        alone.append(ids(data(store, rank=rank, ranks=ranks)))
        assert len(dataset) == -(-len(each[-1]) // 16)
    assert each == alone  # whatever the number of workers
    assert {len(rows) for rows in each} == {ROWS // ranks}
    taken = [row for rows in each for row in rows]
    assert len(set(taken)) == len(taken) == ROWS // ranks * ranks
    assert taken != sorted(taken)


def test_drop_last_and_sizes(store: ActivationStore) -> None:
    for size, block, buffer in [(16, 8, 5), (7, 1, 1), (100, 30, 2), (64, 2000, 3), (2000, 8, 4)]:
        given = {"batch_size": size, "block": block, "buffer": buffer}
        assert sorted(ids(data(store, **given))) == list(range(ROWS))
        full = list(data(store, drop_last=True, **given))
        assert [len(batch["ids"]) for batch in full] == [size] * (ROWS // size)


def test_epochs_differ_and_seeds_repeat(store: ActivationStore) -> None:
    dataset = data(store)
    first, second = ids(dataset), ids(dataset)
    assert dataset.epoch == 2 and sorted(first) == sorted(second) and first != second
    assert ids(data(store)) == first and ids(data(store, seed=1)) != first
    dataset.set_epoch(0)
    assert ids(dataset) == first
    loader = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    for epoch, rows in enumerate([first, second]):
        dataset.set_epoch(epoch)
        assert ids(loader) == rows


def test_rows_are_mixed(store: ActivationStore) -> None:
    """A batch comes from many places of the store: neighbours of 8 rows would have a spread of 2.3."""
    batch = next(iter(data(store, buffer=20)))
    assert batch["ids"].double().std() > ROWS / 8
    assert len({row // 8 for row in batch["ids"].tolist()}) > 8


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 13, 31])
def test_resume(store: ActivationStore, workers: int, stop: int) -> None:
    whole = data(store, rank=1, ranks=2)
    whole.set_epoch(3)
    rows = ids(whole)
    assert whole.state_dict()["epoch"] == 4 and whole.state_dict()["batches"] == 0
    running = data(store, rank=1, ranks=2)
    running.set_epoch(3)
    loader = iter(DataLoader(running, batch_size=None, num_workers=workers))
    before = ids(next(loader) for _ in range(stop))
    state = running.state_dict(batches=stop if workers else None)
    fresh = data(store, rank=1, ranks=2)
    fresh.load_state_dict(state)
    assert before + ids(DataLoader(fresh, batch_size=None, num_workers=2 - workers)) == rows
    with pytest.raises(StoreError, match="the order would be another"):
        data(store, seed=9).load_state_dict(state)


def test_memory_is_the_buffer(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, read = data(store), []
    held = dataset._held["x"]
    tensor = held.torch
    monkeypatch.setattr(held, "torch", lambda rows: read.append(len(rows)) or tensor(rows))
    assert len(ids(dataset)) == ROWS
    assert max(read) <= 8 * 5 and sum(read) == ROWS


def test_bad_sizes(store: ActivationStore) -> None:
    with pytest.raises(StoreError, match="expected sizes from 1 and a rank below ranks, got batch_size=0"):
        data(store, batch_size=0)
    with pytest.raises(StoreError, match="rank=2, ranks=2"):
        data(store, rank=2, ranks=2)
