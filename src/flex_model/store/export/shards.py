"""``Exported``: files of rows in order, each of about so many bytes, and an index of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flex_model.errors import StoreError
from flex_model.store.export.selection import Selection
from flex_model.store.export.staging import HIDDEN_INDEX, INDEX, Sink, Staging

__all__ = ["Exported", "Shards"]


@dataclass(frozen=True, slots=True)
class Exported:
    """Where an export lies and what is in it. ``left_out``: rows of contexts that were not whole (SAELens only)."""

    path: Path
    format: str
    rows: int
    files: tuple[str, ...]
    bytes: int
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class Shards:
    """``total`` rows (or contexts) of ``each`` bytes, in files of at most ``shard_bytes``, or of one row."""

    total: int
    each: int
    shard_bytes: int
    suffix: str

    def __post_init__(self) -> None:
        if self.shard_bytes < 1:
            raise StoreError(f"expected shard_bytes from 1, got {self.shard_bytes}.", page="bad-argument")

    @property
    def cuts(self) -> list[tuple[str, int, int]]:
        """Name, first and after the last, of each file; there is one at least."""
        size = max(1, self.shard_bytes // self.each)
        count = max(1, -(-self.total // size))
        bounds = [i * self.total // count for i in range(count + 1)]
        names = [f"data-{i:05d}-of-{count:05d}.{self.suffix}" for i in range(count)]
        return list(zip(names, bounds[:-1], bounds[1:], strict=True))

    def write(self, folder: Staging, write: Callable[[Sink, int, int], None]) -> None:
        for name, start, stop in self.cuts:
            with folder.file(name) as sink:
                write(sink, start, stop)

    def finish(
        self, folder: Staging, path: str | Path, selection: Selection, *, kind: str, per: int = 1, **more: int
    ) -> Exported:
        """Write the index. ``per``: rows in each of ``total``."""
        names = [name for name, _, _ in self.cuts]
        body: dict[str, Any] = {
            "format": kind,
            "rows": self.total * per,
            **more,
            **{
                part: {name: {"shape": s.shape, "dtype": s.dtype} for name, s in held.items()}
                for part, held in [("sites", selection.sites), ("columns", selection.columns)]
            },
            "files": [
                {"name": name, "rows": [start * per, stop * per], "bytes": folder.sizes[name]}
                for name, start, stop in self.cuts
            ],
            "about": selection.store.about,
        }
        # readers of a folder of Parquet take every file that is not hidden for one
        folder.write(HIDDEN_INDEX if kind == "parquet" else INDEX, body)
        return Exported(Path(path), kind, self.total * per, tuple(names), sum(folder.sizes[n] for n in names), **more)
