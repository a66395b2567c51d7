"""``flex-model lens``, ``patch`` and ``steer``: the numbers and texts of one process over any processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result
from worlds import run_world

from flex_model.cli import app, lens, patch, steer
from flex_model.cli.models import find_model
from flex_model.cli.spread import Spread
from flex_model.cli.start import Desk

pandas = pytest.importorskip("pandas")

SPREADS = [Spread(tp=2), Spread(fsdp=2), Spread(pp=2)]
PROMPTS = ("The cat sat", "on the mat", "and slept. ")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return find_model("tiny-llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes seconds; one test draws them."""
    if "drawn" not in request.node.name:

        def table_only(desk: Desk, name: str, figure: Any, table: Any) -> None:
            if desk.first:
                table.to_csv(desk.out / f"{name}.csv", index=False)

        monkeypatch.setattr(Desk, "write", table_only)


def jobs(kind: str, folder: Path, out: Path, spread: Spread) -> Any:
    out.mkdir(exist_ok=True)
    where = ("tiny", folder, out, spread)
    return {
        "lens": lambda: lens.Job(*where, PROMPTS, None, None, 1),
        "lens of four": lambda: lens.Job(*where, (*PROMPTS, "to rest"), None, None, 1),
        "tuned": lambda: lens.Job(*where, PROMPTS, out / "tuned", None, 3),
        "patch": lambda: patch.Job(*where, ("When Mary", "When John"), ("a", "b"), "resid_pre", "position", False),
        "heads": lambda: patch.Job(*where, ("When Mary", "When John"), ("a", "b"), "z", "head", False),
        "estimate": lambda: patch.Job(*where, ("When Mary", "When John"), ("a", "b"), "z", "head", True),
        "steer": lambda: steer.Job(*where, "I went", ("Love", "Adore"), ("Hate",), 1, 40.0, 5),
    }[kind]()


RUNS = {"lens": lens.run, "lens of four": lens.run, "tuned": lens.run, "steer": steer.run}


def _work(kind: str, folder: Path, out: Path, spread: Spread) -> None:
    RUNS.get(kind, patch.run)(jobs(kind, folder, out, spread))


def same(kind: str, one: Path, other: Path) -> None:
    tables = sorted(p.name for p in one.glob("*.csv"))
    assert tables and tables == sorted(p.name for p in other.glob("*.csv"))
    for name in tables:
        want, got = pandas.read_csv(one / name), pandas.read_csv(other / name)
        assert list(want.columns) == list(got.columns)
        for column in want.columns:
            a, b = torch.tensor(want[column].to_numpy()).double(), torch.tensor(got[column].to_numpy()).double()
            torch.testing.assert_close(b, a, rtol=2e-4, atol=2e-6, msg=f"{name}: {column}")
    for name in ("steer.json",) if kind == "steer" else ():
        assert (one / name).read_text() == (other / name).read_text()


CASES = [
    *[("lens", s) for s in SPREADS],
    ("lens of four", Spread(fsdp=2)),
    *[("tuned", s) for s in SPREADS],
    *[("patch", s) for s in SPREADS],
    ("heads", Spread(tp=2)),
    ("heads", Spread(pp=2)),
    ("estimate", Spread(tp=2)),
    ("estimate", Spread(fsdp=2)),
    *[("steer", s) for s in SPREADS],
]


@pytest.mark.parametrize(("kind", "spread"), CASES, ids=lambda x: str(x).replace(" ", "_"))
def test_the_same_over_processes(kind: str, spread: Spread, folder: Path, tmp_path: Path) -> None:
    _work(kind, folder, tmp_path / "one", Spread())
    run_world(2, _work, kind, folder, tmp_path / "several", spread)
    same(kind, tmp_path / "one", tmp_path / "several")


def test_steering_changes_the_text(folder: Path, tmp_path: Path) -> None:
    _work("steer", folder, tmp_path, Spread())
    told = json.loads((tmp_path / "steer.json").read_text())
    assert told["plain"].startswith("I went") and told["plain"] != told["steered"]


def test_a_tuned_lens_is_trained_once(folder: Path, tmp_path: Path) -> None:
    job = jobs("tuned", folder, tmp_path, Spread())
    lens.run(job)
    before = (tmp_path / "tuned" / "params.pt").stat().st_mtime_ns
    lens.run(job)
    assert (tmp_path / "tuned" / "params.pt").stat().st_mtime_ns == before


def test_in_one_line_and_drawn(folder: Path, tmp_path: Path) -> None:
    done = call("lens", "--model", folder, "--out", tmp_path, "--prompt", "[red]x[/red]")
    assert done.exit_code == 0, done.output
    assert "[red]x[/red]" in done.stdout and "next token" in done.stdout
    assert (tmp_path / "lens.html").exists() and (tmp_path / "lens.csv").exists()
    assert (tmp_path / "lens.png").exists() or "No static picture: a .png needs" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["patch"], "--answer ' Mary' is 5 tokens"),
        (["patch", "--answer", "M", "--against", "J", "--clean", "ab", "--corrupted", "abc"], "of as many tokens"),
        (["steer", "--layer", 2], "--layer 2 is none of the model's 2 layers"),
        (["steer", "--prompt", ""], "--prompt has no tokens"),
        (["lens", "--pp", 2, "--tp", 2], "give --pp alone"),
        (["lens", "--pp", 3], "--pp 3 is more than the model's 2 layers"),
        (["lens", "--tp", 3], "--tp 3 does not divide"),
    ],
)
def test_bad_input(arguments: list[object], said: str, folder: Path, tmp_path: Path) -> None:
    done = call(arguments[0], "--model", folder, "--out", tmp_path, *arguments[1:])
    assert done.exit_code == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.output


def test_a_model_without_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    done = call("lens", "--model", bare, "--out", tmp_path)
    assert done.exit_code == 2 and "no tokenizer can be read from it" in done.stderr, done.output
