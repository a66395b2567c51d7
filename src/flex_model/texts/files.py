"""``FileSource``: records of JSON lines, Parquet and plain text, compressed or not."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from flex_model.errors import DataError
from flex_model.texts.optional import needed
from flex_model.texts.place import Place
from flex_model.texts.record import columns
from flex_model.texts.source import Source

__all__ = ["FileSource", "file_kind", "has_suffix"]

_JSON = (".jsonl", ".ndjson", ".json")
_PACKED = (".gz", ".zst")
_BLOCK = 1 << 16
_PIECES = 16  # of a file, read to tell it from another
_ROWS = 256  # of a table, read at once


def has_suffix(name: str) -> bool:
    """Whether a file of this name is of a known kind."""
    return file_kind(name) in (*_JSON, ".parquet", ".txt")


def file_kind(name: str) -> str:
    """Its suffix, without that of a compression."""
    path = Path(name)
    return Path(path.stem).suffix.lower() if path.suffix.lower() in _PACKED else path.suffix.lower()


class FileSource(Source):
    """Files in this order. Those that are neither JSON lines nor Parquet are text: one document, or one a line."""

    def __init__(self, paths: Sequence[Path], *, lines: bool) -> None:
        self._paths, self._lines = paths, lines
        self.names = [str(path) for path in paths]

    def records(self, start: Place, wanted: Collection[str]) -> Iterator[tuple[Place, Any]]:
        for number in range(start.file, len(self._paths)):
            begin = (start.at, start.line) if number == start.file else (0, 0)
            with _telling(self._paths[number]):
                for at, line, record in self._read(self._paths[number], *begin, wanted):
                    yield Place(number, at, line), record

    def _read(self, path: Path, at: int, line: int, wanted: Collection[str]) -> Iterator[tuple[int, int, Any]]:
        suffix = file_kind(path.name)
        if suffix == ".parquet":
            return _parquet(path, at, wanted)
        if suffix in _JSON:
            return ((a, n, _record(raw, path, n)) for a, n, raw in _lines(path, at, line))
        if self._lines:
            return ((a, n, raw.rstrip(b"\r\n").decode()) for a, n, raw in _lines(path, at, line))
        return iter([(0, 0, _whole(path))])

    def tell(self, place: Place) -> str:
        path = self._paths[place.file]
        suffix = file_kind(path.name)
        if suffix == ".parquet":
            return f"{path}, row {place.line}"
        return f"{path}, line {place.line + 1}" if suffix in _JSON or self._lines else str(path)

    def identity(self, wanted: Collection[str]) -> list[Any]:
        pieces = _PIECES if len(self._paths) <= 64 else 2
        return [self._lines, *(_sampled(path, pieces) for path in self._paths)]


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:  # pyarrow's errors are ValueErrors
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
        raise DataError(f"{path} cannot be read: {why.rstrip('.')}.") from error


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(needed("pyarrow").input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _lines(path: Path, at: int, line: int) -> Iterator[tuple[int, int, bytes]]:
    """Of each line that is not blank: its byte, how many are before it, and itself."""
    with _open(path) as file:
        _skip(file, at)
        for raw in file:
            if not raw.isspace():
                yield at, line, raw
            at, line = at + len(raw), line + 1


def _skip(file: IO[bytes], count: int) -> None:
    if file.seekable():
        file.seek(count)
        return
    while count and (read := len(file.read(min(count, _BLOCK)))):
        count -= read


def _record(raw: bytes, path: Path, line: int) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        whole = " (the file is one array: write a record a line)" if line == 0 and raw.strip() == b"[" else ""
        why = str(error) or type(error).__name__
        raise DataError(f"{path}, line {line + 1}: expected a record in JSON, found {why}{whole}.") from error


def _whole(path: Path) -> str:
    with _open(path) as file:
        return file.read().decode("utf-8-sig")


def _parquet(path: Path, row: int, wanted: Collection[str]) -> Iterator[tuple[int, int, Any]]:
    """From a row on: groups before it are not read."""
    with needed("pyarrow.parquet").ParquetFile(path) as file:
        names = columns(file.schema_arrow.names, wanted, str(path))
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        skip, groups = row, list(range(len(sizes)))
        while groups and sizes[groups[0]] <= skip:
            skip -= sizes[groups.pop(0)]
        for batch in file.iter_batches(_ROWS, row_groups=groups, columns=names) if groups else ():
            for record in batch.slice(min(skip, len(batch))).to_pylist():
                yield row, row, record
                row += 1
            skip = max(0, skip - len(batch))


def _sampled(path: Path, pieces: int) -> list[Any]:
    """Name, size and a digest of blocks that are evenly spread."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with _telling(path), path.open("rb") as file:
        for piece in range(pieces):
            file.seek(max(0, size - _BLOCK) * piece // max(1, pieces - 1))
            digest.update(file.read(_BLOCK))
    return [path.name, size, digest.hexdigest()]
