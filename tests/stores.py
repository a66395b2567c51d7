"""Data for stores that is a function of step and part, and what a store of it must hold."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from flex_model.store import ActivationStore, StoredSite, StoreWriter

SITES = {"mlp": StoredSite((8,), "bfloat16"), "heads": StoredSite((4, 3), "float32")}
COLUMNS = {"token_ids": "int64", "label": "bool"}


def rows_of(step: int, part: int) -> int:
    """Uneven, and sometimes none."""
    return (step * 7 + part * 5) % 11


def values(step: int, part: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1000 * step + part)
    n = rows_of(step, part)
    sites = {
        "mlp": torch.randn(n, 8, generator=draw).to(torch.bfloat16),
        "heads": torch.randn(n, 4, 3, generator=draw) + 5,
    }
    columns = {"token_ids": torch.arange(n) + 1000 * step + 100 * part, "label": torch.rand(n, generator=draw) < 0.5}
    return sites, columns


def expected(steps: int, parts: int) -> dict[str, Tensor]:
    """Of one process: step by step, part by part."""
    each = [values(s, p) for s in range(steps) for p in range(parts)]
    return {name: torch.cat([{**sites, **columns}[name] for sites, columns in each]) for name in [*SITES, *COLUMNS]}


def check_equal(path: str | Path, whole: dict[str, Tensor]) -> ActivationStore:
    store = ActivationStore(path)
    for name, value in whole.items():
        assert torch.equal(store[name].torch(), value), name
    assert store.verify() > 0
    return store


def append(writer: StoreWriter, step: int, part: int, *, split: int = 0, splits: int = 1) -> None:
    """What a rank with the part ``part`` of the rows and ``split`` of the columns holds."""
    sites, columns = values(step, part)
    mine = {}
    for name, value in sites.items():
        size = value.shape[1] // splits
        at, width = slice(split * size, (split + 1) * size), SITES[name].width // splits
        mine[name] = value[:, at], slice(split * width, (split + 1) * width)
    writer.append(step, mine, part=part, columns=columns if split == 0 else None)
