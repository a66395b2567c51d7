"""``flex-model doctor``: all is well here, and a fault is a row that says so and an exit code of 1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import engines
import models
import pytest
import torch
from typer.testing import CliRunner
from worlds import run_world

from flex_model import FlexModel
from flex_model.check.doctor import examine_model, examine_processes
from flex_model.check.report import Report
from flex_model.cli import app
from flex_model.cli import doctor as cli_doctor

SCRIPT = str(Path(sys.executable).with_name("flex-model"))


def _here(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


def _apart(*arguments: object) -> subprocess.CompletedProcess[str]:
    source = str(Path(cli_doctor.__file__).parents[1])
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [SCRIPT, "doctor", *map(str, arguments)],
        capture_output=True, text=True, timeout=250, env={**environment, "PYTHONPATH": source},
    )  # fmt: skip


def test_one_process() -> None:
    result = _here()
    assert result.exit_code == 0, result.output
    for word in ("torch", torch.__version__.split("+")[0], "finite", "hooks", "All is well."):
        assert word in result.output


def test_json() -> None:
    found = json.loads(_here("--json").stdout)
    assert found["ok"] and found["model"] == "toy" and found["versions"]["python"]
    assert {row["status"] for row in found["rows"]} == {"ok"}


@pytest.mark.parametrize("model", ["toy", "tiny-llama"])
def test_split_over_two_processes(model: str, tmp_path: Path) -> None:
    done = _apart("--model", model, "--tp", 2, "--json", "--cache", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    rows = {row["check"]: row for row in found["rows"]}
    assert {row["status"] for row in found["rows"]} == {"ok"}
    assert set(rows) >= {
        "processes",
        "pairs",
        "clocks",
        "mesh",
        "parameters equal",
        "parity",
        "gradient parity",
        "sites",
    }
    assert "gloo" in rows["processes"]["where"] and "tp=2" in rows["mesh"]["where"]
    layouts = {(s["name"], s["side"]): s["layout"] for s in found["sites"]}
    inside = "0.up" if model == "toy" else "model.layers.0.mlp.up_proj"
    assert layouts[inside, "out"] == "tp: S(2)"
    places, tried = (sum(int(rows[c]["found"].split()[0]) for c in ("parity", "gradient parity")) for _ in range(2))
    print(f"doctor, {model}: {places} exact of {tried}")


def test_a_fault_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    made = cli_doctor._toy

    def broken(tp: int) -> Any:
        model, *rest = made(tp)
        with torch.no_grad():
            model[1].down.weight[0, 0] = float("nan")
        return model, *rest

    monkeypatch.setattr(cli_doctor, "_toy", broken)
    result = _here("--json")
    assert result.exit_code == 1
    failed = [row for row in json.loads(result.stdout)["rows"] if row["status"] == "fail"]
    assert failed[0]["check"] == "finite" and failed[0]["where"] == "1.down"

    def raises(tp: int) -> Any:
        raise RuntimeError("no such toy")

    monkeypatch.setattr(cli_doctor, "_toy", raises)
    result = _here()
    assert result.exit_code == 1 and "RuntimeError: no such toy" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "tiny-dinosaur"), "there are tiny-llama"),
        (("--model", "/nowhere"), "no such file or folder"),
        (("--model", "tiny-llama", "--tp", 3), "these do: 1, 2, 4"),
    ],
)
def test_bad_input_is_exit_code_2(arguments: tuple[Any, ...], message: str, tmp_path: Path) -> None:
    result = _here(*arguments, "--cache", tmp_path)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())


def _of_ranks(engine: str) -> list[dict[str, Any]]:
    report = Report()
    examine_processes(report)
    fm = FlexModel(models.net() if engine == "none" else engines.place(engine, models.net()).model)
    examine_model(report, fm, {"ids": models.tokens()}, reference=models.net)
    return report.as_dicts()


def test_a_model_that_is_not_over_all_ranks() -> None:
    rows = run_world(2, _of_ranks, "none")[0]
    failed = [row for row in rows if row["status"] == "fail"]
    assert [row["check"] for row in failed] == ["mesh"] and "is the engine applied?" in failed[0]["advice"]
