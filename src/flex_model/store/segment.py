"""``Segment``: rows and columns of one site that one rank wrote, as a zarr v3 array of one shard.

The shard's inner chunks are whole rows, uncompressed and in order, so that its file is the rows one after another and
then the index of the chunks. It is written by appending and read by mapping it, and any reader of zarr reads it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from flex_model.store.dtypes import numpy_dtype
from flex_model.store.place import Place

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Segment", "SegmentWriter", "checksum"]

_CHUNK_BYTES = 1 << 18  # what a reader of zarr reads at least


@dataclass(frozen=True, slots=True)
class Segment:
    """``rows`` rows of columns ``start`` to ``stop`` of a site, in a folder of the store; ``check`` is of its file."""

    folder: str
    site: str
    dtype: str
    start: int
    stop: int
    rows: int
    check: str

    @property
    def width(self) -> int:
        return self.stop - self.start

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return numpy_dtype(self.dtype)

    @property
    def row_bytes(self) -> int:
        return self.width * self.numpy_dtype.itemsize

    @property
    def data(self) -> str:
        return f"{self.folder}/c/0/0"

    @property
    def chunk_rows(self) -> int:
        return _chunk_rows(self.row_bytes)

    @property
    def chunks(self) -> int:
        return -(-self.rows // self.chunk_rows)

    def metadata(self) -> dict[str, Any]:
        """What zarr calls ``zarr.json``."""
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        inner = little if self.numpy_dtype.itemsize > 1 else {"name": "bytes"}
        sharding = {
            "chunk_shape": [self.chunk_rows, self.width],
            "codecs": [inner],
            "index_codecs": [little],
            "index_location": "end",
        }
        grid = {"chunk_shape": [self.chunks * self.chunk_rows, self.width]}
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [self.rows, self.width],
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": grid},
            "chunk_key_encoding": {"name": "default"},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "fill_value": False if self.dtype == "bool" else 0 if "int" in self.dtype else 0.0,
            "attributes": {"site": self.site, "columns": [self.start, self.stop]},
            "dimension_names": ["row", "column"],
        }

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _chunk_rows(row_bytes: int) -> int:
    return max(1, _CHUNK_BYTES // row_bytes)


class SegmentWriter:
    """Appends rows to a segment that is closed for good by ``close``."""

    def __init__(self, place: Place, folder: str, *, site: str, dtype: str, columns: tuple[int, int]) -> None:
        import xxhash

        self._place = place
        self._draft = Segment(folder, site, dtype, *columns, rows=0, check="")
        self._file = place.appending(self._draft.data)
        self._hash = xxhash.xxh3_128()
        self.rows = 0
        self.bytes = 0

    def append(self, rows: NDArray[np.uint8]) -> None:
        self._put(rows.reshape(-1))
        self.rows += len(rows)

    def _put(self, data: Any) -> None:
        self._file.append(data)
        self._hash.update(data)
        self.bytes += len(data)

    def drop(self) -> None:
        self._file.drop()

    def close(self) -> Segment:
        """Fill the last chunk, write the index, and make the file last."""
        import numpy as np

        draft = self._draft
        chunks = -(-self.rows // draft.chunk_rows)
        size = draft.chunk_rows * draft.row_bytes
        self._put(bytes(chunks * size - self.bytes))
        index = np.stack([np.arange(chunks) * size, np.full(chunks, size)], axis=1)  # (chunks, 2): offset, length
        self._put(index.astype("<u8").tobytes())
        self._file.close()
        done = Segment(
            draft.folder, draft.site, draft.dtype, draft.start, draft.stop, self.rows, self._hash.hexdigest()
        )
        about = self._place.appending(f"{draft.folder}/zarr.json")
        about.append(json.dumps(done.metadata()).encode())
        about.close(durable=False)  # this library does not read it
        return done


def checksum(data: bytes) -> str:
    """xxh3, 128 bits: finds what went wrong by accident, not what was made to deceive."""
    import xxhash

    return str(xxhash.xxh3_128_hexdigest(data))
