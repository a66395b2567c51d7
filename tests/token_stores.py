"""Stores as a harvest writes them: rows of tokens, with the place of each in its context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flex_model.store import ActivationStore, StoredSite, StoreWriter

SIZE, WIDTH = 8, 12
SITES = {"model.layers.1": StoredSite((WIDTH,), "bfloat16"), "model.layers.1.mlp": StoredSite((3, 4))}


def token_store(
    path: Path, lengths: Sequence[Sequence[int]], *, about: dict[str, Any] | None = None, sites: Any = None
) -> ActivationStore:
    """``lengths``: of the contexts of each step, which are one document each."""
    sites, document = sites or SITES, 0
    columns = dict.fromkeys(["token_ids", "documents", "positions"], "int64")
    with StoreWriter.create(
        path, sites=sites, columns=columns, about={"context_size": SIZE, **(about or {})}
    ) as writer:
        for step, each in enumerate(lengths):
            side = _columns(each, document, seed=step)
            writer.append(step, _values(sites, sum(each), seed=step), columns=side)
            document += len(each)
        writer.commit(len(lengths) - 1)
    return ActivationStore(path)


def _values(sites: dict[str, StoredSite], rows: int, *, seed: int) -> dict[str, Tensor]:
    """In a plane, which a small SAE can find."""
    draw, planes = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(0)
    codes = torch.randn(rows, 2, generator=draw).relu()
    return {
        name: (codes @ torch.randn(2, s.width, generator=planes)).reshape(rows, *s.shape).to(getattr(torch, s.dtype))
        for name, s in sites.items()
    }


def _columns(lengths: Sequence[int], document: int, *, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    positions, sizes = [torch.arange(n) for n in lengths], torch.tensor(lengths, dtype=torch.int64)
    return {
        "token_ids": torch.randint(0, 50_000, (sum(lengths),), generator=draw),
        "documents": torch.repeat_interleave(torch.arange(len(lengths)) + document, sizes),
        "positions": torch.cat(positions) if positions else torch.empty(0, dtype=torch.int64),
    }
