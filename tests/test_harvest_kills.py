"""Harvests of several ranks end anywhere, and go on as if nothing had been: ``benchmarks/harvest.py`` kills more."""

from __future__ import annotations

from pathlib import Path

import pytest
from killed import harvest_killed


@pytest.mark.parametrize("engine", ["fsdp2", "tp"])
def test_killed_three_times(engine: str, tmp_path: Path) -> None:
    found = harvest_killed(engine, tmp_path, kills=3, steps=40, seed=1)
    print(f"{engine}: killed after steps {found.after} of {found.steps}, {found.stores} stores of {found.rows} rows")
    assert len(found.after) == 3 and found.stores
