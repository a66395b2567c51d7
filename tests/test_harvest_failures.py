"""What goes wrong in a harvest: said on every rank, and what was committed stays readable and can be gone on with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engines
import models
import pytest
import torch
from test_harvest import batches, by_hand, differences, kept
from test_store_failures import small_disk  # noqa: F401  # a fixture
from torch import Tensor, nn
from worlds import run_world

from flex_model import FlexModel
from flex_model.errors import FlexModelError, HarvestError, LayoutError, StoreError
from flex_model.store import ActivationStore
from flex_model.texts import TokenBatches

SITES = ["layers.0", "layers.1.mlp.act"]


def many() -> list[dict[str, Tensor]]:
    return batches([(3, 6)] * 12)


def want(data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    rows = by_hand(models.net(), data, SITES, lambda b: kept(b["ids"], ()))
    return {**rows, "token_ids": torch.cat([b["ids"].flatten() for b in data])}


class Interrupted(Exception):
    pass


def until(data: list[Any], step: int) -> Iterator[Any]:
    yield from data[:step]
    raise Interrupted


def model(engine: str) -> nn.Module:
    return models.net() if engine == "none" else engines.place(engine, models.net()).model


# -- going on ------------------------------------------------------------------------------------------------------
def _interrupted(engine: str, path: Path, step: int) -> int:
    with pytest.raises(Interrupted):
        FlexModel(model(engine)).harvest(until(many(), step), SITES, path, commit_every=2)
    return ActivationStore(path).last_step


def _finished(engine: str, path: Path) -> int:
    return FlexModel(model(engine)).harvest(many(), SITES, path, commit_every=3).steps


def on(engine: str, function: Any, *args: Any) -> Any:
    results = [function(engine, *args)] if engine == "none" else run_world(2, function, engine, *args)
    assert len(set(results)) == 1
    return results[0]


@pytest.mark.parametrize(("first", "second"), [("none", "tp"), ("tp", "fsdp2"), ("fsdp2", "none"), ("ddp", "sp")])
def test_resumed_under_another_engine(first: str, second: str, tmp_path: Path) -> None:
    path = tmp_path / "acts"
    last = on(first, _interrupted, path, 7)
    assert last in (1, 3, 5)  # of commits after 2, 4 and 6 steps, the last ones may not count yet
    assert not differences(path, want(many()[: last + 1]))
    assert on(second, _finished, path) == 12 - (last + 1)
    assert not differences(path, want(many()))
    assert on(second, _finished, path) == 0  # it is all there


def test_resumed_texts_begin_where_they_were(tmp_path: Path) -> None:
    texts = [" ".join(str((i * j) % 97) for j in range(30)) for i in range(40)]
    path, read = tmp_path / "acts", []

    def documents() -> Iterator[dict[str, Any]]:
        for i, text in enumerate(texts):
            read.append(i)
            yield {"tokens": [int(word) % 32 for word in text.split()], "label": i % 3}

    def made() -> TokenBatches:
        return TokenBatches(documents, context_size=16, batch_size=4, label_field="label", prefetch=0)

    FlexModel(models.net()).harvest(made(), SITES, tmp_path / "whole")

    class Cut(TokenBatches):
        def __iter__(self) -> Iterator[Any]:
            return until_number(super().__iter__(), 11)

    cut = Cut(documents, context_size=16, batch_size=4, label_field="label", prefetch=0)
    with pytest.raises(Interrupted):
        FlexModel(models.net()).harvest(cut, SITES, path, commit_every=3)
    read.clear()
    FlexModel(models.net()).harvest(made(), SITES, path)
    whole, again = ActivationStore(tmp_path / "whole"), ActivationStore(path)
    assert set(again.columns) == {"documents", "positions", "labels", "contexts", "token_ids"}
    contexts = again.columns["contexts"][:]
    assert contexts[0] == 0 and contexts[-1] == len(set(contexts.tolist())) - 1
    for name in (*SITES, *again.columns):
        assert torch.equal(whole[name].torch(), again[name].torch())
    with pytest.raises(HarvestError, match="begun with context_size=16, and this run has 8"):
        FlexModel(models.net()).harvest(TokenBatches(documents, context_size=8, batch_size=4), SITES, path)


def until_number(given: Iterator[Any], number: int) -> Iterator[Any]:
    for batch in given:
        if batch.number == number:
            raise Interrupted
        yield batch


def test_another_run_is_refused(tmp_path: Path) -> None:
    path, fm = tmp_path / "acts", FlexModel(models.net())
    fm.harvest(many(), SITES, path)
    for match, options in {
        "resume=False": {"resume": False},
        r"exclude_tokens=\[\], and this run has \[3\]": {"exclude_tokens": [3]},
        "positions='None', and this run has '-1'": {"positions": -1},
    }.items():
        with pytest.raises(HarvestError, match=match) as told:
            fm.harvest(many(), SITES, path, **options)
        assert told.value.page == "harvest-resume"
    with pytest.raises(HarvestError, match=r"'layers.1' is absent there"):
        fm.harvest(many() * 2, [*SITES, "layers.1"], path)
    with pytest.raises(HarvestError, match=r"'layers.0' is .*float32.* there and .*bfloat16"):
        fm.harvest(many() * 2, SITES, path, dtype="bfloat16")
    assert not differences(path, want(many()))


# -- what has no rows ----------------------------------------------------------------------------------------------
class Odd(nn.Module):
    """Modules that run twice, now and then, without the batch, without tokens, or give no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.twice, self.rarely = nn.Embedding(32, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.pooled, self.table, self.words, self.summed = nn.Linear(8, 8), nn.Linear(8, 8), Words(), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        x = self.twice(self.twice(x)) + self.table(torch.ones(8))
        self.words(x)
        self.pooled(x.mean(1))
        self.summed(x.flatten(0, 1).sum(0, keepdim=True))
        return self.rarely(x) if ids.shape[0] == 3 else x


class Words(nn.Module):
    def forward(self, x: Tensor) -> str:
        return "words"


ODD = {
    "twice": "fired twice in step 0",
    "pooled": r"its shard is \(3, 8\) .* no rows for the batch's \(3, 6\) tokens",
    "table": r"its shard is \(8,\)",
    "summed": r"its shard is \(1, 8\)|the full value is unknown",
    "words": "has no rows: its output is str with 0 tensors",
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("ranks", [1, 2])
def test_no_rows(name: str, ranks: int, tmp_path: Path) -> None:
    def run() -> str:
        odd: nn.Module = Odd() if ranks == 1 else nn.parallel.DistributedDataParallel(Odd())
        with pytest.raises(FlexModelError, match=ODD[name]) as told:
            FlexModel(odd).harvest(batches([(3 * ranks, 6)]), name, tmp_path / "acts", stop=False)
        return str(told.value.page)

    pages = run_world(ranks, run)
    assert set(pages) == {"layout-unknown" if ranks == 2 and name == "summed" else "harvest-rows"}
    assert not (tmp_path / "acts").exists()


def test_a_module_that_does_not_always_run(tmp_path: Path) -> None:
    with pytest.raises(HarvestError, match="'rarely' did not fire in step 1"):
        FlexModel(Odd()).harvest(batches([(3, 6), (2, 6)]), ["rarely"], tmp_path / "acts", stop=False)


def test_rows_of_another_size(tmp_path: Path) -> None:
    with pytest.raises(HarvestError, match="have 5 numbers on rank 0, and had 4 in the first step"):
        data = [torch.ones(2, 4), torch.ones(2, 5)]
        FlexModel(nn.Sequential(nn.Identity(), nn.ReLU())).harvest(data, "0", tmp_path / "acts")


def test_a_selection_of_tokens(tmp_path: Path) -> None:
    for select in ((slice(None), -1), lambda x: x[:, 1:], (slice(0, 1),)):
        with pytest.raises(HarvestError, match="must leave a row for every token"):
            FlexModel(models.net()).harvest(many(), "layers.0", tmp_path / "acts", select=select)
    done = FlexModel(models.net()).harvest(
        many(), "layers.0", tmp_path / "acts", select=lambda x: x.pow(2).sum(-1, keepdim=True), positions=[-1]
    )
    rows = want(many())["layers.0"].view(-1, 6, 8)[:, -1]
    assert torch.allclose(done.store["layers.0"].torch(), rows.pow(2).sum(-1, keepdim=True))


# -- numbers, batches ------------------------------------------------------------------------------------------------
def test_numbers_that_do_not_fit(tmp_path: Path) -> None:
    plain = models.net()
    with torch.no_grad():
        plain.norm.weight.mul_(1e6)
    with pytest.raises(HarvestError, match=r"not finite in torch.float16, in step 0 on rank 0") as told:
        FlexModel(plain).harvest(many(), "norm", tmp_path / "acts", dtype="float16")
    assert told.value.page == "harvest-dtype"
    FlexModel(plain).harvest(many(), "norm", tmp_path / "again", dtype="bfloat16")


WRONG: dict[str, tuple[Any, str]] = {
    "list": ([[torch.ones(2, 3)]], "a batch is a list; expected a dict"),
    "empty": ([{}], "no tensor with samples"),
    "no column": ([{"ids": torch.ones(2, 3, dtype=torch.long)}], "no 'label', which columns= names"),
    "column": ([{"ids": torch.ones(2, 3, dtype=torch.long), "label": torch.ones(4)}], "the column 'label' is"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_batches(case: str, tmp_path: Path) -> None:
    data, match = WRONG[case]
    columns = ["label"] if "column" in case else []
    with pytest.raises(HarvestError, match=match) as told:
        FlexModel(models.net()).harvest(data, "layers.0", tmp_path / "acts", columns=columns)
    assert told.value.page == "harvest-batch"


# -- disks -----------------------------------------------------------------------------------------------------------
def _full(engine: str, path: Path) -> tuple[str, str]:
    wide = engines.place(engine, models.net(width=8, hidden=2048)).model
    data = batches([(8, 16)] * 40)
    with pytest.raises(StoreError, match="No space left on device") as told:
        FlexModel(wide).harvest(data, "layers.*.mlp.act", path, commit_every=1)
    return str(told.value.page), "on rank" if "on rank" in str(told.value) else ""


@pytest.mark.parametrize("small_disk", ["16m"], indirect=True)
@pytest.mark.parametrize("engine", ["tp", "fsdp2"])
def test_full_disk(engine: str, small_disk: Path) -> None:  # noqa: F811
    assert run_world(2, _full, engine, small_disk / "acts") == [("store-place", "on rank")] * 2
    store = ActivationStore(small_disk / "acts")
    assert store.verify() and len(store) % 128 == 0 and len(store) > 0


def test_interrupted_by_the_keyboard(tmp_path: Path) -> None:
    def given() -> Iterator[Any]:
        yield from many()[:6]
        raise KeyboardInterrupt

    fm = FlexModel(models.net().train())
    with pytest.raises(KeyboardInterrupt):
        fm.harvest(given(), SITES, tmp_path / "acts", commit_every=2)
    assert fm.module.training and not fm.hooks() and not fm.module.layers[0]._forward_hooks
    fm.harvest(many(), SITES, tmp_path / "acts")
    assert not differences(tmp_path / "acts", want(many()))


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        FlexModel(models.net()).harvest(many(), SITES, tmp_path / "file" / "acts")


def test_layout_of_experts_is_refused(tmp_path: Path) -> None:
    fm = FlexModel(models.make("qwen3_moe"))
    with pytest.raises(LayoutError, match="tokens at experts") as told:
        fm.harvest([torch.ones(2, 3, dtype=torch.long)], "model.layers.1.mlp.experts.act_fn", tmp_path / "acts")
    assert told.value.page == "rows-are-parts"
