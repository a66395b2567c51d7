"""Contexts for SAELens: whole ones, as they were, and never padded. SAELens itself: test_store_export_peers.py."""

from __future__ import annotations

import json
import os
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_store_export import counted, fail_at
from token_stores import SIZE, WIDTH, token_store
from torch import Tensor

from flex_model.errors import StoreError
from flex_model.store import ActivationStore, StoredSite, StoreWriter
from flex_model.store.export import Exported, contexts, saelens, selection, to_saelens
from flex_model.store.export.contexts import Contexts, Windows

pytest.importorskip("numpy")
pytest.importorskip("ml_dtypes")
pytest.importorskip("xxhash")
datasets = pytest.importorskip("datasets")

LENGTHS = [[SIZE] * 3, [SIZE, SIZE], [], [SIZE] * 4]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_PIECE", 3000)  # bytes: 2 or 3 contexts
    monkeypatch.setattr(contexts, "_ROWS", 13)


def loaded(made: Exported) -> dict[str, Tensor]:
    found = datasets.load_from_disk(made.path).with_format("torch")
    return {name: torch.stack(list(found[name][:])) for name in found.column_names}


@pytest.mark.parametrize("shard_bytes", [1, 1500, 1 << 30])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_equals_the_store(tmp_path: Path, dtype: str, shard_bytes: int) -> None:
    store = token_store(tmp_path / "acts", LENGTHS)
    hooks = {"model.layers.1": "blocks.1.hook_resid_post"}
    made = to_saelens(
        store, tmp_path / "out", hook_names=hooks, sites=store.sites, dtype=dtype, shard_bytes=shard_bytes
    )
    found = loaded(made)
    assert list(found) == ["blocks.1.hook_resid_post", "model.layers.1.mlp", "token_ids"]
    for name, value in zip(found, ["model.layers.1", "model.layers.1.mlp", "token_ids"], strict=True):
        whole = store[value].torch().reshape(9, SIZE, -1)
        whole = whole.squeeze(-1) if name == "token_ids" else whole.to(getattr(torch, dtype))
        assert torch.equal(found[name], whole)
    features = datasets.load_from_disk(made.path).features  # as SAELens's CacheActivationsRunner makes them
    assert features["blocks.1.hook_resid_post"] == datasets.Array2D((SIZE, WIDTH), dtype)
    assert features["token_ids"] == datasets.Sequence(datasets.Value("int32"), length=SIZE)
    assert (made.rows, made.left_out) == (9 * SIZE, 0) and (len(made.files) == 1) == (shard_bytes > 1500)


def test_sites_are_those_of_hook_names(tmp_path: Path) -> None:
    store = token_store(tmp_path / "acts", LENGTHS)
    made = to_saelens(store, tmp_path / "out", hook_names={"model.layers.1.mlp": "blocks.1.hook_mlp_out"})
    assert list(loaded(made)) == ["blocks.1.hook_mlp_out", "token_ids"]


def test_incomplete_contexts(tmp_path: Path) -> None:
    store = token_store(tmp_path / "acts", [[SIZE, 5], [3, SIZE], [SIZE - 1]])
    told = (
        "15 of 31 rows are in contexts without a row for each position from 0 to 7, and 2 contexts are whole; leave "
        "them out with incomplete='drop', or say packed=True"
    )
    give = {"sites": ["model.layers.1"], "dtype": "float32"}
    with pytest.raises(StoreError, match=told) as error:
        to_saelens(store, tmp_path / "out", **give)
    assert error.value.page == "export-contexts" and os.listdir(tmp_path) == ["acts"]
    made = to_saelens(store, tmp_path / "out", incomplete="drop", **give)
    whole = store["model.layers.1"].torch().float()
    assert torch.equal(loaded(made)["model.layers.1"], torch.stack([whole[:8], whole[16:24]]))
    assert (made.rows, made.left_out) == (16, 15)
    assert json.loads((made.path / "index.json").read_text())["left_out"] == 15
    with pytest.raises(StoreError, match=r"31 of 31 rows .* and 0 contexts are whole; say packed=True"):
        to_saelens(store, tmp_path / "none", context_size=9, incomplete="drop", **give)


def test_a_first_token_that_was_not_stored(tmp_path: Path) -> None:
    """As SAELens's ``seqpos_slice=(1, None)``."""
    whole, positions = torch.randn(3 * SIZE, 4), torch.arange(SIZE).repeat(3)
    keep = positions > 0
    with StoreWriter.create(tmp_path / "acts", sites={"x": StoredSite((4,))}, columns={"positions": "int64"}) as writer:
        writer.append(0, {"x": whole[keep]}, columns={"positions": positions[keep]})
        writer.commit(0)
    store = ActivationStore(tmp_path / "acts")
    with pytest.raises(StoreError, match="21 of 21 rows are in contexts without a row for each position from 0 to 7"):
        to_saelens(store, tmp_path / "out", context_size=SIZE)
    with pytest.raises(StoreError, match="does not say its context_size; give context_size="):
        to_saelens(store, tmp_path / "out")
    made = to_saelens(store, tmp_path / "out", context_size=SIZE - 1, start=1)
    assert torch.equal(loaded(made)["x"], whole.view(3, SIZE, 4)[:, 1:])
    assert list(loaded(made)) == ["x"]  # no token_ids in the store
    part = to_saelens(store, tmp_path / "part", context_size=3, start=2)
    assert torch.equal(loaded(part)["x"], whole.view(3, SIZE, 4)[:, 2:5]) and part.left_out == 12


def windows_by_hand(
    table: list[tuple[int, int, int, int]], size: int, start: int, packed: bool
) -> tuple[list[int], int]:
    """First rows of whole contexts and the number of rows of others; ``table``: row, step, document, position."""
    runs: list[list[tuple[int, int]]] = []
    for at, (row, step, document, position) in enumerate(table):
        before = table[at - 1] if at else None
        if before and before == (row - 1, step, before[2] if packed else document, position - 1):
            runs[-1].append((row, position))
        else:
            runs.append([(row, position)])
    firsts, others = [], 0
    for run in runs:
        inside = [row for row, position in run if start <= position < start + size]
        if len(inside) == size:
            firsts.append(inside[0])
        else:
            others += len(inside)
    return firsts, others


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_contexts_by_hand(tmp_path: Path, seed: int, packed: bool) -> None:
    """Random lengths, documents and rows that were not stored, in several steps."""
    draw = random.Random(seed)
    rows: list[tuple[int, int, int]] = []  # step, document, position
    document = 0
    for step in range(6):
        for _ in range(draw.randrange(5)):
            document += 1
            for position in range(draw.choice([4, 4, 4, 7, 2])):
                document += draw.random() < 0.1
                if draw.random() > 0.05:
                    rows.append((step, document, position))
    columns = dict.fromkeys(["documents", "positions"], "int64")
    with StoreWriter.create(tmp_path / "acts", sites={"x": StoredSite((1,))}, columns=columns) as writer:
        for step in range(6):
            side = torch.tensor([row[1:] for row in rows if row[0] == step], dtype=torch.int64).reshape(-1, 2)
            named = {"documents": side[:, 0], "positions": side[:, 1]}
            writer.append(step, {"x": torch.zeros(len(side), 1)}, columns=named)
        writer.commit(5)
    store = ActivationStore(tmp_path / "acts")
    some = sorted(draw.sample(range(len(rows)), len(rows) * 3 // 4))
    for chosen in (range(len(rows)), torch.tensor(some, dtype=torch.int64).numpy()):
        for size, start in [(4, 0), (3, 1), (1, 0), (7, 0)]:
            table = [(int(row), *rows[row]) for row in chosen]
            firsts, others = windows_by_hand(table, size, start, packed)
            found = Contexts(store, chosen, size, start=start, packed=packed)
            if not firsts or others:
                with pytest.raises(StoreError, match=f"^{others} of {len(table)} rows .* and {len(firsts)} contexts"):
                    found.count(drop=False)
            if firsts:
                assert found.count(drop=True) == len(firsts)
                taken = Windows(found)
                assert [int(row) for _ in firsts for row in taken.take(1)] == firsts
                assert Windows(found).take(len(firsts)).tolist() == firsts


def test_packed_contexts(tmp_path: Path) -> None:
    documents = torch.arange(2 * SIZE) // 5
    columns = {"documents": documents, "positions": torch.arange(SIZE).repeat(2)}
    for about, given in [({}, {"packed": True}), ({"packed": True}, {})]:
        path = tmp_path / str(len(about))
        told = {"context_size": SIZE, **about}
        sites = {"x": StoredSite((2,))}
        with StoreWriter.create(path, sites=sites, columns=dict.fromkeys(columns, "int64"), about=told) as writer:
            writer.append(0, {"x": torch.randn(2 * SIZE, 2)}, columns=columns)
            writer.commit(0)
        with pytest.raises(StoreError, match="16 of 16 rows"):
            to_saelens(ActivationStore(path), tmp_path / "out", packed=False)
        assert to_saelens(ActivationStore(path), tmp_path / f"out{len(about)}", **given).rows == 2 * SIZE


def test_numbers_of_contexts_are_believed(tmp_path: Path) -> None:
    """One context lacks its end, and the next what comes before: positions alone would make one of them."""
    columns = {"positions": torch.arange(SIZE), "contexts": torch.tensor([0] * 5 + [1] * 3)}
    with StoreWriter.create(
        tmp_path / "acts", sites={"x": StoredSite((2,))}, columns=dict.fromkeys(columns, "int64")
    ) as writer:
        writer.append(0, {"x": torch.randn(SIZE, 2)}, columns=columns)
        writer.commit(0)
    with pytest.raises(StoreError, match=r"8 of 8 rows .* and 0 contexts are whole"):
        to_saelens(ActivationStore(tmp_path / "acts"), tmp_path / "out", context_size=SIZE)


def test_bad_arguments(tmp_path: Path) -> None:
    store = token_store(tmp_path / "acts", LENGTHS)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"dtype": None}, "SAELens's Array2D has no bfloat16, which 'model.layers.1' is; give dtype='float32'"),
        ({"dtype": "bfloat16"}, "SAELens's Array2D has no bfloat16"),
        ({"hook_names": {"layers.9": "x"}}, "'layers.9' is none of the store's"),
        ({"sites": ["model.layers.1"], "hook_names": {"model.layers.1.mlp": "x"}}, "expected hook_names for some of"),
        ({"hook_names": dict.fromkeys(store.sites, "x")}, "each of its own"),
        ({"hook_names": {"model.layers.1": "token_ids"}}, "none 'token_ids'"),
        ({"incomplete": "pad"}, "incomplete='pad' is unknown; expected 'refuse' or 'drop'"),
        ({"context_size": 0}, "expected a context_size from 1 and a start from 0, got 0 and 0"),
        ({"start": -1}, "got 8 and -1"),
    ]
    for given, match in cases:
        with pytest.raises(StoreError, match=match):
            to_saelens(store, tmp_path / "out", **{"dtype": "float32", **given})
    with StoreWriter.create(tmp_path / "bare", sites={"x": StoredSite((2,))}) as writer:
        writer.append(0, {"x": torch.zeros(8, 2)})
        writer.commit(0)
    with pytest.raises(StoreError, match=r"contexts need the column 'positions' .*; the store has no columns"):
        to_saelens(ActivationStore(tmp_path / "bare"), tmp_path / "out", context_size=4)
    assert sorted(os.listdir(tmp_path)) == ["acts", "bare"]


def test_token_ids_beyond_int32(tmp_path: Path) -> None:
    columns = {"positions": torch.arange(2), "token_ids": torch.tensor([1, 1 << 31])}
    with StoreWriter.create(
        tmp_path / "acts", sites={"x": StoredSite((2,))}, columns=dict.fromkeys(columns, "int64")
    ) as writer:
        writer.append(0, {"x": torch.zeros(2, 2)}, columns=columns)
        writer.commit(0)
    with pytest.raises(StoreError, match="SAELens reads token_ids as int32, and the store has larger ones"):
        to_saelens(ActivationStore(tmp_path / "acts"), tmp_path / "out", context_size=2)
    assert os.listdir(tmp_path) == ["acts"]


def test_an_error_leaves_nothing_and_progress_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = token_store(tmp_path / "acts", LENGTHS * 5)
    with monkeypatch.context() as patch:
        fail_at(patch, 9, RuntimeError("no"))
        with pytest.raises(RuntimeError):
            to_saelens(store, tmp_path / "out", dtype="float32", shard_bytes=2000)
    assert os.listdir(tmp_path) == ["acts"]
    bars: list[list[int]] = []
    monkeypatch.setattr(saelens, "progress_bar", partial(counted, bars))
    made = to_saelens(store, tmp_path / "out", dtype="float32", shard_bytes=4000, progress=True)
    ((total, done),) = bars
    assert total == done >= len(made.files) > 5
