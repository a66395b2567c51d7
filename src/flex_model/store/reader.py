"""``ActivationStore``: activations on disk, read a few rows at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flex_model.errors import RowError, StoreError
from flex_model.store import commits
from flex_model.store.commits import Commit
from flex_model.store.dtypes import as_torch, numpy_dtype
from flex_model.store.index import Index
from flex_model.store.manifest import Manifest, StoredSite
from flex_model.store.place import Place, open_place, telling
from flex_model.store.segment import checksum

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from flex_model.store.moments import Moments

__all__ = ["ActivationStore", "StoredRows"]

_OPEN = 128  # segments that are kept mapped


class ActivationStore:
    """A store in a folder or at a URL, as of the last whole commit; also while it is being written.

    >>> store = ActivationStore("acts")                                                 # doctest: +SKIP
    >>> store["mlp"].shape, store["mlp"].dtype                                          # doctest: +SKIP
    ((81920, 576), 'bfloat16')
    >>> store["mlp"][:4], store["mlp"].torch([5, 3]), store.columns["token_ids"][:4]    # doctest: +SKIP

    ``sites``: names; ``columns``: side columns by name; ``about``: what the writer said. Raises StoreError where
    there is no store, or a damaged one, and RowError for a row or name that it does not have.
    """

    def __init__(self, path: str | Path) -> None:
        self._files = _Files(open_place(path))
        manifest = self._files.manifest()
        self.about: dict[str, Any] = manifest.about
        self._rows = {name: StoredRows(name, site, self) for name, site in manifest.all.items()}
        self.sites: list[str] = list(manifest.sites)
        self.columns: Mapping[str, StoredRows] = {name: self._rows[name] for name in manifest.columns}
        self._index = Index.of([])
        self._commit = Commit(-1)  # the last
        self.refresh()

    def __getitem__(self, site: str) -> StoredRows:
        if site not in self._rows:
            raise RowError(f"{site!r} is none of the store's: {', '.join(self._rows)}.")
        return self._rows[site]

    def __len__(self) -> int:
        """Rows."""
        return self._index.rows

    def __repr__(self) -> str:
        return f"ActivationStore({str(self._files.place)!r}, rows={len(self)}, sites={self.sites})"

    def refresh(self) -> None:
        """Take in what was committed since."""
        self._index, self._commit = self._files.index()

    @property
    def last_step(self) -> int:
        """Of the last commit; -1 before the first."""
        return self._commit.step

    def step(self, step: int) -> range:
        """The rows of a step; none if it had none."""
        parts = self._index.parts
        mine = parts[parts[:, 0] == step]
        return range(int(mine[0, 2]), int(mine[-1, 2:].sum())) if len(mine) else range(0)

    def verify(self) -> int:
        """Compare every segment with its checksum; their number. Raises StoreError that names what differs."""
        self._files.moments(self._commit)
        wrong = []
        for segment in self._index.segments:
            with telling(f"{self._files.place}/{segment.data} cannot be read"):
                data = self._files.place.read(segment.data)
            if data is None or checksum(data) != segment.check:
                wrong.append(f"{segment.data} ({segment.rows} rows of {segment.site!r})")
        if wrong:
            raise StoreError(
                f"{self._files.place}: {len(wrong)} of {len(self._index.segments)} segments are not what was written: "
                f"{', '.join(wrong[:5])}; bring them back from a copy.",
                page="store-damaged",
            )
        return len(self._index.segments)

    def _moments(self, site: str) -> Moments:
        found = self._files.moments(self._commit)
        if site not in found:
            raise RowError(f"{site!r} has no statistics: it has no rows yet, or is a side column.")
        return found[site]


class _Files:
    """The files of a store, and a few segments that are open."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._open: OrderedDict[str, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"place": self.place, "_open": OrderedDict()}  # a worker maps its own

    def manifest(self) -> Manifest:
        with telling(f"{self.place} cannot be read"):
            manifest = Manifest.load(self.place)
        if manifest is None:
            raise StoreError(f"{self.place} is no store; expected a manifest.json in it.", page="store-exists")
        return manifest

    def index(self) -> tuple[Index, Commit]:
        """And the last commit."""
        with telling(f"{self.place} cannot be read"):
            found = [Commit.load(self.place, step) for step in commits.committed_steps(self.place)]
        return Index.of(found), found[-1] if found else Commit(-1)

    def moments(self, commit: Commit) -> dict[str, Moments]:
        """By site; none before the first commit."""
        with telling(f"{self.place} cannot be read"):
            return commits.load_moments(self.place, commit) if commit.moments else {}

    def rows(self, index: Index, number: int, rows: Any) -> Any:
        """Rows of a segment."""
        segment = index.segments[number]
        with telling(f"{self.place}/{segment.data} cannot be read"):
            if segment.folder not in self._open:
                self._open[segment.folder] = self.place.rows(segment)
                if len(self._open) > _OPEN:
                    self._open.popitem(last=False)
            self._open.move_to_end(segment.folder)
            return self._open[segment.folder][rows]


class StoredRows:
    """One site, or one side column, of a store: ``rows[...]`` is numpy, ``rows.torch(...)`` a tensor.

    An int gives one row, a slice or a list of rows (list, array, tensor; negative from the end; a mask is none)
    several, in the order asked for. Only these are read. numpy knows bf16 and fp8 by ml_dtypes.
    """

    def __init__(self, name: str, site: StoredSite, store: ActivationStore) -> None:
        self.name, self.dtype, self.layout = name, str(site.dtype), site.layout
        self._site, self._store = site, store

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self._site.shape)

    def __len__(self) -> int:
        return len(self._store)

    def __repr__(self) -> str:
        return f"StoredRows({self.name!r}, shape={self.shape}, dtype={self.dtype})"

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, rows: Any) -> NDArray[Any]:
        import numpy as np

        if isinstance(rows, (int, np.integer)):
            found: NDArray[Any] = self._read(self._numbers([int(rows)]))[0]
            return found
        return self._read(self._numbers(rows))

    def torch(self, rows: Any = slice(None)) -> Tensor:
        """A tensor of its own memory."""
        import numpy as np

        one = isinstance(rows, (int, np.integer))
        read = as_torch(self._read(self._numbers([rows] if one else rows)), self.dtype)
        return read[0] if one else read

    @property
    def mean(self) -> Tensor:
        """Of every column over all rows, in float64, without reading them; ``(...)`` as one row."""
        return as_torch(self._store._moments(self.name).mean, "float64").reshape(self._site.shape)

    @property
    def std(self) -> Tensor:
        """Of every column: of the population, divided by the number of rows."""
        return as_torch(self._store._moments(self.name).std, "float64").reshape(self._site.shape)

    @property
    def norm(self) -> float:
        """The root of the mean squared norm of rows."""
        return self._store._moments(self.name).norm

    def _numbers(self, rows: Any) -> NDArray[np.int64]:
        import numpy as np

        size = len(self)
        if isinstance(rows, slice):
            return np.arange(*rows.indices(size), dtype=np.int64)
        found = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows)
        if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
            raise RowError(f"{self.name!r}: expected an int, a slice or a list of ints, got a {type(rows).__name__}.")
        found = found.astype(np.int64)
        wrong = found[(found < -size) | (found >= size)]
        if len(wrong):
            raise RowError(f"{self.name!r}: expected rows below {size}, got {int(wrong[0])}.")
        return np.where(found < 0, found + size, found)

    def _read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """``(rows, ...)``, joined over the splits of columns."""
        import numpy as np

        index = self._store._index
        read = np.empty((len(rows), self._site.width), numpy_dtype(self.dtype))
        for lane in index.lanes.get(self.name, ()):
            where, segments, inside = lane.find(rows)
            for number in np.unique(segments):
                mine = segments == number
                part = self._store._files.rows(index, int(number), _compact(inside[mine]))
                read[where[mine], lane.columns[0] : lane.columns[1]] = part
        return read.reshape(len(rows), *self._site.shape)


def _compact(rows: NDArray[np.int64]) -> Any:
    """Rows that follow one another as a slice, which is read at once."""
    straight = bool((rows[1:] - rows[:-1] == 1).all())
    return slice(int(rows[0]), int(rows[-1]) + 1) if straight else rows
