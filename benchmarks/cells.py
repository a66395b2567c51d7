"""Cells of a benchmark: functions that run in fresh processes, one or a world of ranks, and what they took.

python -m cells MODULE FUNCTION < keywords.json
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

BENCHMARKS = Path(__file__).parent
TESTS = BENCHMARKS.parent / "tests"


def cell(module: str, function: str, *, ranks: int = 1, python: str = sys.executable, **keywords: Any) -> list[Any]:
    """What ``function(**keywords)`` returns on each rank; all keywords, and what it returns, are JSON."""
    env = os.environ | {"OMP_NUM_THREADS": str(keywords.get("threads", 1)), "TOKENIZERS_PARALLELISM": "false"}
    if python != sys.executable:
        env.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as folder:
        running = [_start(python, module, function, env | _place(rank, ranks, folder)) for rank in range(ranks)]
        for process in running:
            assert process.stdin is not None
            process.stdin.write(json.dumps(keywords))
            process.stdin.close()
        return [_result(process) for process in running]


def _place(rank: int, ranks: int, folder: str) -> dict[str, str]:
    if ranks == 1:
        return {}
    sizes = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    return {"GLOO_SOCKET_IFNAME": "lo", "MEETING": f"{folder}/store"} | {n: str(s) for n, s in sizes.items()}


def _start(python: str, module: str, function: str, env: dict[str, str]) -> subprocess.Popen[str]:
    command = [python, "-m", "cells", module, function]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, cwd=BENCHMARKS, env=env, text=True, **pipes)


def _result(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    told = process.stdout.read().strip().splitlines()
    if process.wait():
        raise RuntimeError(f"{' '.join(map(str, process.args))} ended with {process.returncode}")
    return json.loads(told[-1])


def main(module: str, function: str) -> None:
    keywords = json.load(sys.stdin)
    sys.path.append(str(TESTS))
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        import torch.distributed as dist

        dist.init_process_group(
            "gloo", store=dist.FileStore(os.environ["MEETING"], ranks), rank=int(os.environ["RANK"]), world_size=ranks
        )
    found = getattr(importlib.import_module(module), function)(**keywords)
    print(json.dumps(found), flush=True)
    if ranks > 1:
        dist.destroy_process_group()


# -- measuring -------------------------------------------------------------------------------------------------
@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Seconds within the block, of the wall and of all threads' CPU; this process's memory in MiB: before and after,
    and at most, by the kernel's own high-water mark, which is set back first."""
    found: dict[str, float] = {}
    Path("/proc/self/clear_refs").write_text("5")
    found["before"] = _status("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    yield found
    found |= {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    found |= {"peak": _status("VmHWM"), "after": _status("VmRSS")}


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def synced(folder: str | Path) -> None:
    """All files below a folder are on the disk, whoever wrote them."""
    for path in [p for p in Path(folder).rglob("*") if p.is_file()]:
        with path.open("rb") as file:
            os.fsync(file.fileno())


# -- tables ----------------------------------------------------------------------------------------------------
def spread(values: Sequence[float], form: str) -> str:
    """The median, and the least and the most."""
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def table(rows: Sequence[Sequence[Any]]) -> list[str]:
    """The first row is the head."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""]


if __name__ == "__main__":
    main(*sys.argv[1:])
