"""How many lines of user code six common tasks take, in FlexModel and in its peers. Every snippet is run.

Each snippet (``lines/<tool>/<task>.py``) is the shortest code found, after the page named in its first line. Calls may
be chained, lambdas used, and several values made in one statement, by all; a trained probe has a name. It starts with a
loaded model and token ids (``given.py``, ``preamble.py``: not counted) and ends with ``answer``, which must be within
1e-5 of plain torch's (``oracle.py``). Counted are statements, by ``ast``: each assignment, expression, ``with`` and
``for`` is one, imports are none. In brackets: lines of code but imports, as ``ruff format`` makes them in 100 columns.

    python benchmarks/lines.py              all tools, each in an environment of its own; writes the table to results/
    python benchmarks/lines.py --check      FlexModel's snippets alone, and the newest table that was written
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import subprocess
import sys
import tokenize
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import environments
import torch

SNIPPETS, RESULTS = (Path(__file__).parent / name for name in ("lines", "results"))
OURS = "flex_model"
TASKS = {
    "residuals": "cache the residuals of all layers",
    "ablate": "ablate a head",
    "patch": "sweep patches over layers and positions",
    "steer": "find a steering vector and steer",
    "induction": "induction scores of all heads",
    "probe": "train a probe and predict test rows",
}


class Tool(NamedTuple):
    title: str
    needs: list[str]
    folder: str  # of its environment
    note: str = ""


WITH = ["torch==2.13.0", "transformers==5.23.0", "scikit-learn==1.9.1"]
OLDER = ["pyvene==0.1.8", "torch==2.13.0", "transformers==4.57.6", "scikit-learn==1.9.1"]
TOOLS = {
    OURS: Tool("FlexModel", ["flex-model", "torch", "transformers"], "", "in the environment of the script"),
    "transformer_lens": Tool("TransformerLens", ["transformer-lens==4.3.0", *WITH], "transformer_lens"),
    "nnsight": Tool("nnsight", ["nnsight==0.8.1", *WITH], "nnsight"),
    "pyvene": Tool("pyvene", OLDER, "pyvene", "under transformers 5 it finds no attention weights"),
    "baukit": Tool("baukit", WITH, "torch", "not on PyPI; `Trace` and `TraceDict` are written by hand, uncounted"),
    "torch_hooks": Tool("plain hooks", WITH, "torch", "hooks of torch, and what transformers itself returns"),
}


def count(source: str) -> tuple[int, int]:
    """Statements, and lines with code on them."""
    tree = ast.parse(source)
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    statements = sum(isinstance(n, ast.stmt) for n in ast.walk(tree)) - len(imports)
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in blank]
    lines = {line for t in tokens for line in range(t.start[0], t.end[0] + 1)}
    return statements, len(lines - {line for n in imports for line in range(n.lineno, (n.end_lineno or n.lineno) + 1)})


def counted(tool: str, task: str) -> str:
    return "{} ({})".format(*count((SNIPPETS / tool / f"{task}.py").read_text()))


def python_of(tool: str) -> str:
    """The tool's interpreter; its environment is made if it is not there."""
    if tool == OURS:
        return sys.executable
    return environments.make(TOOLS[tool].folder, TOOLS[tool].needs)


def run(tool: str) -> dict[str, Any]:
    """Versions, and each answer or why there is none."""
    try:
        command = [python_of(tool), str(SNIPPETS / "answers.py"), tool, ",".join(TASKS), ",".join(TOOLS[tool].needs)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except subprocess.CalledProcessError as error:
        if tool == OURS:
            raise RuntimeError(error.stderr) from None
        return {"versions": {}, "answers": dict.fromkeys(TASKS, error.stderr.strip().rpartition("\n")[2])}


def wrong(answer: Any, expected: Any) -> str:
    """Why an answer does not count, or nothing."""
    if isinstance(answer, str):
        return answer
    mine, theirs = (torch.tensor(x, dtype=torch.float64) for x in (answer, expected))
    off = float((mine - theirs).norm() / theirs.norm()) if mine.shape == theirs.shape else float("inf")
    return "" if off <= 1e-5 else f"{off:.0e} off plain torch"


def table(found: dict[str, dict[str, Any]]) -> str:
    rows = [["task", *(t.title for t in TOOLS.values())], ["---"] * (len(TOOLS) + 1)]
    for task, told in TASKS.items():
        failed = {t: wrong(found[t]["answers"][task], found[OURS]["oracle"][task]) for t in TOOLS}
        rows.append([told, *(f"no: {failed[t].replace('|', '/')}" if failed[t] else counted(t, task) for t in TOOLS)])
    lines = [f"| {' | '.join(row)} |" for row in rows] + [""]
    for t, tool in TOOLS.items():
        versions = ", ".join(f"{p} {v}" for p, v in found[t]["versions"].items()) or "not installed"
        lines.append(f"* {tool.title}: {versions}" + (f" ({tool.note})" if tool.note else ""))
    return "\n".join(lines)


def check(page: str) -> None:
    """The page has the counts of the snippets as they are, and nobody's is below ours."""
    rows = [[c.strip() for c in line.split("|")[2:-1]] for line in page.splitlines() if line.startswith("| ")][2:]
    for task, row in zip(TASKS, rows, strict=True):
        numbers = {t: c for t, c in zip(TOOLS, row, strict=True) if not c.startswith("no: ")}
        stale = [t for t, c in numbers.items() if c != counted(t, task)]
        assert not stale, f"{task}: {', '.join(stale)} changed since the table was made; run this script again"
        both = [map(int, c.strip(")").split(" (")) for c in numbers.values()]  # statements, lines
        least = "{} ({})".format(*map(min, zip(*both, strict=True))) if both else ""
        assert numbers.get(OURS) == least, f"{task}: FlexModel has {row[0]}, which is not the least of {numbers}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="FlexModel's snippets alone, and the newest table")
    if parser.parse_args().check:
        found = run(OURS)
        failed = {t: w for t in TASKS if (w := wrong(found["answers"][t], found["oracle"][t]))}
        assert not failed, failed
        check(max(RESULTS.glob("*-lines.md")).read_text())
        return print(f"{len(TASKS)} snippets agree with plain torch; none has more statements or lines than a peer's")
    rules = __doc__.partition("\n\n")[2].partition("\n\n ")[0].replace("``", "`")
    page = f"# Lines of user code, {date.today()}\n\n{rules}\n\n{table({t: run(t) for t in TOOLS})}\n"
    print(page)
    (RESULTS / f"{date.today()}-lines.md").write_text(page)
    check(page)


if __name__ == "__main__":
    main()
