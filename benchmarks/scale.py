"""What one rank pays for layouts at 2 to 1,024 ranks: 1,000 sites on a mesh of up to five axes, in a world that is not
there (torch's ``fake`` process group). CPU seconds of this rank, and the most memory its Python objects took.

    python benchmarks/scale.py [--sites 1000]
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from fake_world import Deep, fake_world, inputs, mesh_of, python_memory, spread

from flex_model import FlexModel
from flex_model.core import inference

GRIDS = ((1, 1, 1, 1, 2), (1, 2, 1, 1, 4), (2, 2, 2, 2, 2), (4, 4, 2, 2, 4), (4, 4, 4, 4, 4))


def _timed(spent: dict[str, float], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] += time.process_time() - start

    return run


@contextmanager
def _collections(spent: dict[str, float]) -> Iterator[None]:
    """Adds the seconds of Python's garbage collections to ``spent["gc"]``: they fall where they fall."""
    started = [0.0]

    def note(phase: str, _: dict[str, int]) -> None:
        now = time.process_time()
        if phase == "start":
            started[0] = now
        else:
            spent["gc"] += now - started[0]

    gc.callbacks.append(note)
    try:
        yield
    finally:
        gc.callbacks.remove(note)


def _seconds(function: Callable[..., Any], *args: Any) -> float:
    spent: dict[str, float] = defaultdict(float)
    _timed(spent, "", function)(*args)
    return spent[""]


def measure(grid: tuple[int, ...], sites: int, rank: int = 1) -> dict[str, float]:
    """Seconds by part, and MiB."""
    spent: dict[str, float] = defaultdict(float)
    kept = inference.claim, inference.settle, inference.Probe.along, inference.Twin.shapes
    inference.claim = _timed(spent, "claims", inference.claim)
    inference.settle = _timed(spent, "settling", inference.settle)
    inference.Probe.along = _timed(spent, "probe", inference.Probe.along)  # type: ignore[method-assign]
    inference.Twin.shapes = _timed(spent, "twin", inference.Twin.shapes)  # type: ignore[method-assign]
    try:
        return _measure(grid, sites, rank, spent)
    finally:
        inference.claim, inference.settle, inference.Probe.along, inference.Twin.shapes = kept  # type: ignore


def _measure(grid: tuple[int, ...], sites: int, rank: int, spent: dict[str, float]) -> dict[str, float]:
    ranks = int(torch.tensor(grid).prod())
    with fake_world(ranks, rank % ranks), torch.no_grad():
        mesh = mesh_of(grid)
        fm = FlexModel(spread(Deep(sites, 8 * max(grid)), mesh), mesh=mesh)
        _timed(spent, "groups", fm._runtime.mesh.prepare)()
        mine = inputs(mesh)
        _timed(spent, "forward", fm.module)(*mine)
        for memory in (False, True):
            fm._runtime.refresh()
            fm._runtime.mesh.prepare()
            with fm.capture("layers.*", deliver="main"):
                if memory:
                    kept = dict(spent)
                    with python_memory() as peak:
                        fm(*mine)
                    spent.clear()
                    spent.update(kept)
                else:
                    with _collections(spent):
                        _timed(spent, "first call", fm)(*mine)
                    plan = _timed(spent, "plan", fm.plan)()
                    assert len(plan) == sites and not any(row.refusal for row in plan)
                    again = min(_seconds(fm, *mine) for _ in range(3))
                    spent["inference"] = spent["first call"] - again + spent["plan"]
        return {"ranks": ranks, **spent, "MiB": peak[0] / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=1000)
    sites = parser.parse_args().sites
    torch.set_num_threads(1)
    measure(GRIDS[0], 10)  # what is made once
    rows = [measure(grid, sites) for grid in GRIDS]
    columns = ["ranks", "forward", "probe", "twin", "claims", "settling", "plan", "inference", "gc", "groups", "MiB"]
    print(
        f"{sites} sites; the probes (batch, sequence) are three forwards of the model, the twin two on meta tensors\n"
        "inference: the plan, and all that the first captured call takes longer than later ones\n"
        "gc: the searches of Python's garbage collector in the first call, among whichever part they fell into"
    )
    print("".join(f"{c:>10}" for c in columns))
    for row in rows:
        print(f"{row['ranks']:10.0f}" + "".join(f"{row.get(c, 0):10.3f}" for c in columns[1:]))


if __name__ == "__main__":
    main()
