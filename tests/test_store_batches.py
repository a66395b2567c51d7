"""Batches for trainers of SAEs: those of a RowDataset, again and on from anywhere. The trainers themselves:
test_store_export_peers.py."""

from __future__ import annotations

import gc
import multiprocessing
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from flex_model.errors import StoreError
from flex_model.store import ActivationStore, RowDataset, StoredSite, StoreWriter
from flex_model.store.export import Batches, HookBatches, Replay

pytest.importorskip("numpy")
pytest.importorskip("ml_dtypes")
pytest.importorskip("xxhash")

ROWS, SITES = 203, {"layers.1": StoredSite((2, 3), "bfloat16"), "layers.1.mlp": StoredSite((5,))}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    path = tmp_path_factory.mktemp("batches") / "acts"
    with StoreWriter.create(path, sites=SITES, columns={"ids": "int64"}) as writer:
        draw = torch.Generator().manual_seed(0)
        values = {n: torch.randn(ROWS, *s.shape, generator=draw).to(getattr(torch, s.dtype)) for n, s in SITES.items()}
        writer.append(0, values, columns={"ids": torch.arange(ROWS)})
        writer.commit(0)
    return ActivationStore(path)


def data(store: ActivationStore, sites: Any = ("layers.1",), **more: Any) -> RowDataset:
    return RowDataset(store, sites=list(sites), **{"batch_size": 16, "block": 8, "buffer": 5, **more})


def by_hand(store: ActivationStore, epochs: int, name: str = "layers.1", **more: Any) -> list[Tensor]:
    rows = data(store, SITES, **more)
    return [batch[name].flatten(1).float() for _ in range(epochs) for batch in rows]


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_data_set(store: ActivationStore, workers: int) -> None:
    wanted = by_hand(store, 3)
    assert wanted[0].shape == (16, 6) and not torch.equal(wanted[0], wanted[12])
    assert same(list(Batches(data(store), epochs=3, workers=workers)), wanted)
    endless = Batches(data(store), workers=workers)
    assert iter(endless) is endless
    assert same(list(islice(endless, 36)), wanted)
    assert next(Batches(data(store), dtype=torch.bfloat16)).dtype == torch.bfloat16
    with pytest.raises(StopIteration):
        next(Batches(data(store), epochs=0))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 5, 12, 17])
def test_it_goes_on_from_a_checkpoint(store: ActivationStore, workers: int, taken: int) -> None:
    running = Batches(data(store), epochs=3, workers=workers)
    assert len(list(islice(running, taken))) == taken
    state = running.state_dict()
    fresh = Batches(data(store), epochs=3, workers=2 - workers)
    next(fresh)
    fresh.load_state_dict(state)
    assert same(list(fresh), by_hand(store, 3)[taken:])
    with pytest.raises(StoreError, match="the order would be another"):
        Batches(data(store, seed=1)).load_state_dict(state)


def test_workers_end_with_the_batches(store: ActivationStore) -> None:
    """At once, and not when cycles of references are looked for, which took 5 seconds a worker."""
    batches = Batches(data(store), workers=2)
    next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    gc.disable()
    try:
        del batches
        assert not multiprocessing.active_children()
    finally:
        gc.enable()


def test_ranks_have_rows_of_their_own(store: ActivationStore) -> None:
    for rank in range(2):
        given = {"rank": rank, "ranks": 2, "drop_last": False}
        assert same(list(Batches(data(store, **given), epochs=1)), by_hand(store, 1, **given))


def test_several_hooks(store: ActivationStore) -> None:
    found = list(HookBatches(data(store, SITES), hook_names={"layers.1": "blocks.1.hook_resid_post"}, epochs=2))
    assert same([batch["blocks.1.hook_resid_post"] for batch in found], by_hand(store, 2))
    assert same([batch["layers.1.mlp"] for batch in found], by_hand(store, 2, "layers.1.mlp"))
    assert all(len(batch) == 2 for batch in found)


def test_bad_arguments(store: ActivationStore) -> None:
    with pytest.raises(StoreError, match=r"expected a data set of one site, got \['layers.1', 'layers.1.mlp'\]"):
        Batches(data(store, SITES))
    with pytest.raises(StoreError, match="has no batch: its batch_size is larger than the rows of a rank"):
        Batches(data(store, batch_size=ROWS + 1))
    for names in ({"other": "x"}, {"layers.1": "layers.1.mlp"}):
        with pytest.raises(StoreError, match="expected hook_names for some of"):
            HookBatches(data(store, SITES), hook_names=names)
    with pytest.raises(StoreError, match=r"expected hookpoints=.* of the data set's"):
        Replay(data(store), hookpoints={"other": "x"})
    with pytest.raises(StoreError, match="two sites have the same hook point"):
        Replay(data(store, SITES), hookpoints={"layers.1": "layers.1.mlp"})


def seen(replay: Replay, dataset: Any, points: list[str], *, batch_size: int) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """Of each step: what hooks on the model's modules see, as sparsify's trainer runs it."""
    found: list[dict[str, tuple[Tensor, Tensor]]] = []
    handles = [
        replay.model.base_model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: found[-1].update({name: (args[0], out)})
        )
        for name in points
    ]
    for batch in DataLoader(dataset, batch_size=batch_size, shuffle=False):
        found.append({})
        replay.model(batch["input_ids"])
    for handle in handles:
        handle.remove()
    return found


def test_a_replay_gives_the_rows_of_the_store(store: ActivationStore) -> None:
    replay = Replay(data(store, SITES), hookpoints={"layers.1": "h.1"}, epochs=2)
    assert len(replay.dataset) == 24
    found = seen(replay, replay.dataset, ["h.1", "layers.1.mlp"], batch_size=3)
    for name, site in [("h.1", "layers.1"), ("layers.1.mlp", "layers.1.mlp")]:
        each = [step[name][1] for step in found]
        assert each[0].shape == (3, 16, SITES[site].width) and each[0].dtype == torch.float32
        assert same([item for step in each for item in step], by_hand(store, 2, site))
        assert all(torch.equal(*step[name]) for step in found)


def test_a_module_within_a_hook_point(store: ActivationStore) -> None:
    for sites in (["layers.1", "layers.1.mlp"], ["layers.1.mlp", "layers.1"]):
        replay = Replay(data(store, sites))
        names = [name for name, _ in replay.model.base_model.named_modules()]
        assert names == ["", "layers", "layers.1", "layers.1.mlp"]
        assert set(seen(replay, replay.dataset, sites, batch_size=1)[0]) == set(sites)


def test_a_replay_for_transcoders(store: ActivationStore) -> None:
    replay = Replay(data(store, SITES), inputs={"layers.1.mlp": "layers.1"}, hookpoints={"layers.1.mlp": "h.1.mlp"})
    found = seen(replay, replay.dataset, ["h.1.mlp"], batch_size=1)
    assert same([step["h.1.mlp"][0][0] for step in found], by_hand(store, 1))
    assert same([step["h.1.mlp"][1][0] for step in found], by_hand(store, 1, "layers.1.mlp"))


def test_a_replay_goes_on_from_an_item(store: ActivationStore) -> None:
    replay = Replay(data(store), epochs=2)
    for first in (0, 5, 12, 20):
        rest = replay.dataset.select(range(first, 24))
        assert len(rest) == 24 - first
        found = seen(replay, rest, ["layers.1"], batch_size=2)
        assert same([item for step in found for item in step["layers.1"][1]], by_hand(store, 2)[first:])
        last = rest.select(range(2, len(rest)))
        assert next(iter(last))["input_ids"].tolist() == next(islice(rest, 2, 3))["input_ids"].tolist()
    with pytest.raises(StoreError, match="expected items up to the last, 24, got range"):
        replay.dataset.select(range(3, 9))


def test_a_replay_refuses_other_rows(store: ActivationStore) -> None:
    replay = Replay(data(store))
    items = iter(DataLoader(replay.dataset, batch_size=1))
    first = next(items)["input_ids"]
    replay.model(first)
    with pytest.raises(StoreError, match="gives the rows that its own data set has just dealt"):
        replay.model(first)  # once
    second = next(items)["input_ids"]
    with pytest.raises(StoreError, match="was asked for others"):
        replay.model(second.flip(1))
    workers = iter(DataLoader(replay.dataset, batch_size=1, num_workers=1))  # they hold the rows, not this process
    with pytest.raises(StoreError, match="without workers"):
        replay.model(next(workers)["input_ids"])


def test_a_replay_has_widths_and_no_logits(store: ActivationStore) -> None:
    replay = Replay(data(store, SITES))
    widths = {}
    for name in SITES:
        replay.model.base_model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: widths.update({name: out.shape[-1]})
        )
    replay.model(**replay.model.dummy_inputs)
    assert widths == {name: site.width for name, site in SITES.items()}
    batch = next(iter(DataLoader(replay.dataset, batch_size=1)))["input_ids"]
    with pytest.raises(StoreError, match="a store has no loss; of sparsify's losses it serves 'fvu' alone"):
        replay.model(batch, labels=batch).loss  # noqa: B018
