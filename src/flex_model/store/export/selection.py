"""``Selection``: what of a store goes out, in which dtypes, read a bounded piece at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from flex_model.errors import StoreError
from flex_model.store.dtypes import DTYPES, dtype_name
from flex_model.store.manifest import StoredSite
from flex_model.store.reader import ActivationStore

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["PLAIN", "Rows", "Selection", "piece", "torch_dtype"]

Rows: TypeAlias = "range | NDArray[np.int64]"

PLAIN = tuple(name for name in DTYPES if not name.startswith(("bfloat", "float8")))  # what numpy and Arrow have
_INTO = ("float16", "bfloat16", "float32", "float64")
_PIECE = 1 << 23  # bytes that are read at once, of all sites together


@dataclass(frozen=True, slots=True)
class Selection:
    """``kept``: sites and side columns as they go out, by name; ``rows``: numbers of the store's rows, in order."""

    store: ActivationStore
    sites: dict[str, StoredSite]
    columns: dict[str, StoredSite]
    rows: Rows = field(repr=False)

    @classmethod
    def of(
        cls,
        store: ActivationStore,
        *,
        sites: Sequence[str] | None,
        columns: Sequence[str] | None = None,
        rows: Any = None,
        dtype: Any = None,
        allowed: Sequence[str] = DTYPES,
        what: str = "",
    ) -> Selection:
        """``dtype`` is of sites of floating point; ``allowed`` are the dtypes that ``what`` has."""
        into = None if dtype is None else dtype_name(dtype)
        if into is not None and into not in _INTO:
            raise StoreError(f"expected a dtype of {', '.join(_INTO)}, got {into!r}.", page="bad-argument")
        names = _names(store, sites, store.sites, kind="site")
        kept = {name: _as(store[name]._site, into) for name in names}
        side = {name: store[name]._site for name in _names(store, columns, list(store.columns), kind="column")}
        for name, site in {**kept, **side}.items():
            if site.dtype not in allowed:
                way = "leave it out" if name in side else "give dtype='float32', which loses nothing, or 'float16'"
                raise StoreError(f"{what} has no {site.dtype}, which {name!r} is; {way}.", page="export-dtype")
        return cls(store, kept, side, _numbers(store, rows))

    @property
    def all(self) -> dict[str, StoredSite]:
        return {**self.sites, **self.columns}

    @property
    def row_bytes(self) -> int:
        return sum(site.width * torch_dtype(site.dtype).itemsize for site in self.all.values())

    def pieces(self, start: int, stop: int, *, row_bytes: int) -> Iterator[Rows]:
        """The numbers of the rows at ``start`` to ``stop`` of the selection, a piece at a time."""
        for at in range(start, stop, size := piece(row_bytes)):
            yield self.rows[at : min(at + size, stop)]

    def read(self, name: str, rows: Rows) -> Tensor:
        """``(rows, ...)`` as it goes out. Raises StoreError where a value is beyond the range of its dtype."""
        import numpy as np

        found = self.store[name].torch(np.asarray(rows))
        into = torch_dtype(self.all[name].dtype)
        if found.dtype == into:
            return found
        cast = found.to(into)
        if found.dtype.itemsize > 1 and torch.finfo(into).max < torch.finfo(found.dtype).max:
            self._check_range(name, rows, found, cast)
        return cast

    def _check_range(self, name: str, rows: Rows, found: Tensor, cast: Tensor) -> None:
        if not cast.numel() or all(edge.isfinite() for edge in cast.aminmax()):
            return
        lost = int((cast.isinf() & ~found.isinf()).sum())
        if lost:
            raise StoreError(
                f"{name!r}: {lost} values of {len(rows)} rows from row {int(rows[0])} on are beyond the range of "
                f"{self.all[name].dtype}; give dtype='float32'.",
                page="export-dtype",
            )


def piece(row_bytes: int) -> int:
    """Rows, or contexts, that are in memory at once."""
    return max(1, _PIECE // row_bytes)


def torch_dtype(name: Any) -> torch.dtype:
    found: torch.dtype = getattr(torch, str(name))
    return found


def _as(site: StoredSite, dtype: str | None) -> StoredSite:
    floats = torch_dtype(site.dtype).is_floating_point
    return StoredSite(site.shape, dtype if dtype is not None and floats else site.dtype, site.layout)


def _names(store: ActivationStore, given: Sequence[str] | None, known: Sequence[str], *, kind: str) -> list[str]:
    names = list(known) if given is None else [given] if isinstance(given, str) else list(given)
    for name in names:
        store[name]  # says what there is instead
        if name not in known:
            raise StoreError(
                f"{name!r} is no {kind} of the store; its {kind}s: {', '.join(known)}.", page="bad-argument"
            )
    if len(set(names)) < len(names) or (kind == "site" and not names):
        raise StoreError(f"expected {kind}s, each once, got {names}.", page="bad-argument")
    return names


def _numbers(store: ActivationStore, rows: Any) -> Rows:
    """A range where it can be one, so that nothing grows with the store."""
    if rows is None:
        return range(len(store))
    if isinstance(rows, slice):
        return range(*rows.indices(len(store)))
    held = store[store.sites[0]]
    if isinstance(rows, range) and rows and min(rows) >= 0:
        held._numbers([rows[0], rows[-1]])
        return rows
    return held._numbers(list(rows) if isinstance(rows, range) else rows)
