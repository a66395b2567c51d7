"""The examples print the same on one process and on two, as their first lines say."""

from __future__ import annotations

import io
import os
import re
import runpy
import socket
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch.distributed as dist
from worlds import run_world

FOLDER = Path(__file__).parents[1] / "examples"
PLAIN = ("capture", "train_probe")  # of plain torch; the others load a model of transformers
LOADED = ("attribution_patching", "induction_heads", "patching", "probe", "steering", "train_sae", "tuned_lens")
EXAMPLES = (*PLAIN, *LOADED)
NUMBER = re.compile(r"-?\d+\.\d+")


def _printed(name: str, arguments: tuple[str, ...], port: int) -> list[str]:
    """The example as the script of this rank, in the process that a world has forked."""
    dist.destroy_process_group()  # it makes its own
    os.environ.update(MASTER_PORT=str(port), MODEL="tiny-llama", SPREAD="fsdp" if arguments else "tp")
    sys.argv = [f"{name}.py", *arguments]
    sys.path.insert(0, str(FOLDER))
    with redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    return out.getvalue().splitlines()


def printed(name: str, ranks: int, *arguments: str) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first, *others = run_world(ranks, _printed, name, arguments, port)
    assert others == [[]] * (ranks - 1)
    return first


@pytest.fixture(scope="module", params=EXAMPLES)
def alone(request: pytest.FixtureRequest) -> tuple[str, list[str]]:
    pytest.importorskip("transformers")
    return request.param, printed(request.param, 1)


@pytest.mark.parametrize("arguments", [(), ("--fsdp2",)], ids=["tp", "fsdp2"])
def test_two_ranks_print_what_one_process_prints(alone: tuple[str, list[str]], arguments: tuple[str, ...]) -> None:
    name, want = alone
    found = printed(name, 2, *arguments)
    assert len(want) > 1 and [NUMBER.sub("#", x) for x in found] == [NUMBER.sub("#", x) for x in want]
    for ours, theirs in zip(found, want, strict=True):
        got = [float(n) for n in NUMBER.findall(ours)]
        assert got == pytest.approx([float(n) for n in NUMBER.findall(theirs)], rel=1e-4, abs=1.01e-4), ours


def test_as_a_command() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": str(FOLDER.parent / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(FOLDER / "capture.py")], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.returncode == 0 and done.stdout.splitlines() == printed("capture", 1), done.stderr[-3000:]


def test_all_examples_are_run() -> None:
    assert {p.stem for p in FOLDER.glob("*.py")} == {*EXAMPLES, "loading"}  # which is a part of the others


@pytest.mark.parametrize("name", LOADED)
def test_notebooks_are_the_scripts(name: str) -> None:
    """As they were when they ran, without an error."""
    jupytext, nbformat = pytest.importorskip("jupytext"), pytest.importorskip("nbformat")
    script = jupytext.read(FOLDER / f"{name}.py")
    notebook = nbformat.read(FOLDER / "notebooks" / f"{name}.ipynb", as_version=4)
    assert [c.source for c in notebook.cells] == [c.source for c in script.cells]
    outputs = [o for c in notebook.cells for o in c.get("outputs", [])]
    assert outputs and not any(o.output_type == "error" for o in outputs)


def test_a_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("jupytext", "nbclient", "ipykernel"):
        pytest.importorskip(module)
    make = runpy.run_path(str(FOLDER / "notebooks" / "make.py"))
    monkeypatch.setenv("MODEL", "tiny-llama")
    done = make["run"](FOLDER / "steering.py")
    said = "".join(o.text for c in done.cells for o in c.get("outputs", []) if o.output_type == "stream")
    assert "steered by +2" in said
