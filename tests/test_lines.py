"""The comparison of lines of code: how they are counted, FlexModel's snippets, and the table that was made."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def lines() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_of_lines", BENCHMARKS / "lines.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)  # as for a script in it
        spec.loader.exec_module(module)
    return module


def test_counting(lines: ModuleType) -> None:
    assert lines.count("# why\nimport torch\nfrom given import (\n    a,\n    b,\n)\n\nx = a\n") == (1, 1)
    assert lines.count("with a as b:  # here\n    c(\n        b,\n    )\n    d = 1; e = 2\n") == (4, 5)
    assert lines.count("def f(x):\n\n    return x\n\n\nanswer = [\n    # none\n    f(x) for x in y\n]\n") == (3, 5)


def test_what_does_not_agree_is_told(lines: ModuleType) -> None:
    assert lines.wrong([[1.0, 2.0]], [[1.0, 2.0]]) == ""
    assert lines.wrong([1.0, 2.0], [1.0, 2.1]) and lines.wrong([1.0], [1.0, 2.0])
    assert lines.wrong("KeyError: 'x'", [1.0]) == "KeyError: 'x'"


def test_a_table_in_which_somebody_is_shorter_is_refused(lines: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    ones = {task: [1.0] for task in lines.TASKS}
    found = {tool: {"versions": {}, "answers": ones, "oracle": ones} for tool in lines.TOOLS}
    page, counted = lines.table(found), lines.counted
    lines.check(page)
    monkeypatch.setattr(lines, "counted", lambda tool, task: "0 (0)" if tool == "nnsight" else counted(tool, task))
    with pytest.raises(AssertionError, match="nnsight changed"):
        lines.check(page)
    with pytest.raises(AssertionError, match="FlexModel has"):
        lines.check(lines.table(found))
    found["nnsight"]["answers"] = dict.fromkeys(lines.TASKS, "ImportError: no such name")
    assert "| no: ImportError: no such name |" in lines.table(found)
    lines.check(lines.table(found))


def test_snippets_are_laid_out_by_ruff() -> None:
    pytest.importorskip("ruff")
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, BENCHMARKS / "lines"], capture_output=True)
        assert done.returncode == 0, done.stdout.decode()


def test_the_snippets_of_flexmodel_agree_with_plain_torch() -> None:
    pytest.importorskip("transformers")
    done = subprocess.run([sys.executable, BENCHMARKS / "lines.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
