"""Part ``kills``: harvests of two ranks, killed at random moments and gone on with, by ``tests/killed.py``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from cells import cell, table

ENGINES = {"fsdp2": "FSDP2", "tp": "tensor parallelism"}
STEPS = 120


def killed(*, engine: str, folder: str, kills: int, seed: int) -> Any:
    from killed import harvest_killed  # in tests

    Path(folder).mkdir()
    return asdict(harvest_killed(engine, Path(folder), kills=kills, steps=STEPS, seed=seed))


def report(options: Any) -> list[str]:
    rows = [["two ranks of", "kills", "last committed step at each", "stores that were done", "rows of each"]]
    for seed, (engine, title) in enumerate(ENGINES.items()):
        given = {"engine": engine, "folder": f"{options.folder}/{engine}", "kills": options.kills, "seed": seed}
        (found,) = cell("harvests.kills", "killed", **given)
        after = ", ".join(map(str, found["after"]))
        rows.append([title, len(found["after"]), after, f"{found['stores']}, all equal", found["rows"]])
    return [
        "Killed",
        f"A small model on two ranks, {STEPS} steps, a commit every 3. All ranks are killed at once (`SIGKILL`) at "
        f"random moments, and started again until the harvest is done; one that is done too soon is begun anew. After "
        f"every kill the rows that are committed, and at the end all sites and columns, are equal to those of a "
        f"harvest that nobody disturbed, and `verify()` finds nothing.",
        "",
        *table(rows),
    ]
