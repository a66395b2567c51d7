"""The examples print the same on one process and on two, as their first lines say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = ("capture", "train_probe", "probe", "train_sae")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
NUMBER = re.compile(r"-?\d+\.\d+")


def lines(name: str, *arguments: str, ranks: int = 1) -> list[str]:
    command = [sys.executable, *(TORCHRUN if ranks > 1 else []), str(FOLDER / f"{name}.py"), *arguments]
    source = str(FOLDER.parent / "src")
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": source, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module", params=EXAMPLES)
def alone(request: pytest.FixtureRequest) -> tuple[str, list[str]]:
    return request.param, lines(request.param)


@pytest.mark.parametrize("arguments", [(), ("--fsdp2",)], ids=["tp", "fsdp2"])
def test_two_ranks_print_what_one_process_prints(alone: tuple[str, list[str]], arguments: tuple[str, ...]) -> None:
    name, want = alone
    found = lines(name, *arguments, ranks=2)
    assert len(want) > 1 and [NUMBER.sub("#", x) for x in found] == [NUMBER.sub("#", x) for x in want]
    for ours, theirs in zip(found, want, strict=True):
        got = [float(n) for n in NUMBER.findall(ours)]
        assert got == pytest.approx([float(n) for n in NUMBER.findall(theirs)], rel=1e-4, abs=1.01e-4), ours


def test_all_examples_are_run() -> None:
    assert {p.stem for p in FOLDER.glob("*.py")} == {*EXAMPLES, "loading"}  # loading.py is a part of two


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_short(name: str) -> None:
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) <= 80
