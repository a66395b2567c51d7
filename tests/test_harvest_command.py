"""``flex-model harvest``: the rows of ``fm.harvest``, over any processes; what it tells beforehand, and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result
from worlds import run_world

from flex_model import FlexModel
from flex_model.cli import app
from flex_model.cli.harvest import Job, run
from flex_model.cli.models import find_model
from flex_model.cli.spread import Spread
from flex_model.store import ActivationStore

SPREADS = [Spread(tp=2), Spread(fsdp=2), Spread(pp=2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return find_model("tiny-llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "some.jsonl"
    words = ["the cat sat on the mat", "and slept", "When Mary and John went to the store, John gave it to her"] * 5
    path.write_text("".join(json.dumps({"text": word, "kind": i % 2}) + "\n" for i, word in enumerate(words)))
    return path


def call(folder: Path, texts: Path, out: Path, *arguments: object) -> Result:
    always = ["harvest", "--model", folder, "--data", texts, "--out", out, "--context-size", 16]
    return CliRunner().invoke(app, list(map(str, [*always, *arguments])))


def test_rows(folder: Path, texts: Path, tmp_path: Path) -> None:
    result = call(folder, texts, tmp_path / "acts", "--site", "resid_post", "--site", "z", "--layers", "0-1",
                  "--label-field", "kind", "--batch-size", 2)  # fmt: skip
    assert result.exit_code == 0, result.output
    store = ActivationStore(tmp_path / "acts")
    assert store.sites == ["@resid_post.0", "@resid_post.1", "@z.0", "@z.1"]
    assert store.about["context_size"] == 16 and store.about["packed"]
    assert f"{len(store):,} rows of 4 sites" in result.output
    ids = torch.from_numpy(store.columns["token_ids"][:16])[None]
    fm = FlexModel(Spread().load(folder))
    with torch.no_grad():
        want = fm.capture(fm.at("resid_post", 1)).run(ids)["@resid_post.1"][0]
    assert torch.allclose(store["@resid_post.1"].torch(slice(0, 16)), want, atol=1e-5)
    assert set(store.columns["labels"][:].tolist()) == {0, 1}


def _job(folder: Path, texts: Path, out: Path, spread: Spread) -> Job:
    given: dict[str, Any] = {"source": str(texts), "context_size": 16, "batch_size": 3}
    return Job("tiny", folder, str(out), spread, ("resid_post", "model.layers.1.mlp"), None, given, {"commit_every": 2})


def test_over_processes(folder: Path, texts: Path, tmp_path: Path) -> None:
    run(_job(folder, texts, tmp_path / "one", Spread()))
    one = ActivationStore(tmp_path / "one")
    for spread in SPREADS:
        out = tmp_path / str(spread.tp * 100 + spread.fsdp * 10 + spread.pp)
        run_world(2, run, _job(folder, texts, out, spread))
        several = ActivationStore(out)
        several.verify()
        for name in (*one.sites, *one.columns):
            assert torch.allclose(one[name].torch().double(), several[name].torch().double(), atol=1e-5), (spread, name)


def test_dry_run(folder: Path, texts: Path, tmp_path: Path) -> None:
    result = call(folder, texts, tmp_path / "acts", "--dry-run", "--dtype", "float16", "--max-tokens", 100)
    assert result.exit_code == 0 and not (tmp_path / "acts").exists()
    assert "@resid_post.1" in result.output and "float16" in result.output and "GB are free" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "1-x"], "'1-x' is no number and no range"),
        (["--site", "resid"], "matches no module"),
        (["--dtype", "int3"], "dtype 'int3' cannot be stored"),
        (["--text-field", "words"], "words"),
        (["--tp", "3"], "does not divide"),
    ],
)
def test_bad_arguments(folder: Path, texts: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = call(folder, texts, tmp_path / "acts", *arguments)
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output
    assert not (tmp_path / "acts").exists()


def test_no_data(folder: Path, tmp_path: Path) -> None:
    result = call(folder, tmp_path / "none.jsonl", tmp_path / "acts")
    assert result.exit_code == 2 and "none.jsonl" in result.output
