"""Where a store lies: a folder, or a bucket by URL. Files are named by paths below it, joined by slashes."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from flex_model.errors import StoreError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from flex_model.store.segment import Segment

__all__ = ["MANIFEST", "Appending", "Folder", "Place", "open_place", "telling"]

MANIFEST = "manifest.json"  # there in every store, and the last file that makes one


@contextmanager
def telling(what: str) -> Iterator[None]:
    """An error of the disk or the network becomes a StoreError that says what was being done."""
    try:
        yield
    except StoreError:
        raise
    except (OSError, ValueError, KeyError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
        why = why.partition(" [")[0] or "no answer in time"  # tensorstore appends the server's whole answer
        raise StoreError(
            f"{what}: {why.rstrip('.')}; what was committed stays readable: make room or put the place right, then "
            f"StoreWriter.resume.",
            page="store-place",
        ) from error


class Appending(ABC):
    """A file that grows at its end and is there as a whole after ``close``."""

    @abstractmethod
    def append(self, data: Any) -> None: ...

    @abstractmethod
    def close(self, *, durable: bool = True) -> None: ...

    @abstractmethod
    def drop(self) -> None:
        """Instead of ``close``: nothing needs it."""


class Place(ABC):
    """A store's files."""

    buffers = False  # whether a file that is being appended to is held in memory until it is closed

    @abstractmethod
    def make(self) -> None:
        """Be there, for a new store."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """None where there is no such file."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """As a whole or not at all, also if the machine stops within it."""

    @abstractmethod
    def appending(self, name: str) -> Appending: ...

    @abstractmethod
    def listing(self, folder: str) -> list[str]:
        """Names of all files below a folder, in order."""

    @abstractmethod
    def remove(self, names: list[str]) -> None: ...

    @abstractmethod
    def rows(self, segment: Segment) -> NDArray[Any]:
        """What reads rows of a segment when it is indexed."""


def open_place(path: str | Path) -> Place:
    """By path or URL (``file://``, ``s3://``, ``gs://``)."""
    missing = [name for name in ("numpy", "ml_dtypes", "safetensors", "xxhash") if find_spec(name) is None]
    if missing:
        raise StoreError(f"a store needs {', '.join(missing)}; install flex-model[store].", page="not-installed")
    scheme, _, rest = str(path).partition("://")
    if not rest:
        return Folder(Path(path))
    if scheme == "file":
        return Folder(Path(unquote(urlsplit(str(path)).path)))
    from flex_model.store.bucket import Bucket

    return Bucket(str(path))


class Folder(Place):
    """Plain files, so that a process may fork while a store is open: tensorstore's threads end a forked process."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def make(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)

    def read(self, name: str) -> bytes | None:
        try:
            return (self.root / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, data: bytes) -> None:
        target = self.root / name
        # by process and thread: several ranks may write one folder
        part = target.with_name(f"{target.name}.{os.getpid()}-{threading.get_ident()}.part")
        file = _AppendingFile(part, self.root)
        try:
            file.append(data)
            file.close()
            os.replace(part, target)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)

    def appending(self, name: str) -> Appending:
        return _AppendingFile(self.root / name, self.root)

    def listing(self, folder: str) -> list[str]:
        found = []
        for at, _, files in os.walk(self.root / folder):
            found += [(Path(at) / file).relative_to(self.root).as_posix() for file in files]
        return sorted(found)

    def remove(self, names: list[str]) -> None:
        for name in names:
            (self.root / name).unlink(missing_ok=True)
        for folder in sorted({p for name in names for p in Path(name).parents if p != Path(".")}, reverse=True):
            at = self.root / folder
            if at.is_dir() and folder.parent != Path(".") and not any(at.iterdir()):
                at.rmdir()

    def rows(self, segment: Segment) -> NDArray[Any]:
        import numpy as np

        shape = (segment.rows, segment.width)
        path = self.root / segment.data
        if path.stat().st_size < segment.row_bytes * segment.rows:
            raise StoreError(f"{path} is shorter than its {segment.rows} rows.", page="store-damaged")
        return np.memmap(path, dtype=segment.numpy_dtype, mode="r", shape=shape)


_AHEAD = 1 << 23  # bytes


class _AppendingFile(Appending):
    """What is appended is sent to the disk while more comes, so that ``close`` waits for the last of it only."""

    def __init__(self, path: Path, root: Path) -> None:
        if not root.is_dir():
            raise StoreError(f"the folder {root} is gone; bring it back, then StoreWriter.resume.")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb", buffering=0)
        self._folder = path.parent
        self._written = self._sent = 0

    def append(self, data: Any) -> None:
        left = memoryview(data).cast("B")
        while len(left):
            count = self._file.write(left)
            left, self._written = left[count:], self._written + count
            if self._written - self._sent >= _AHEAD:
                _send(self._file.fileno(), self._sent, self._written - self._sent)
                self._sent = self._written

    def close(self, *, durable: bool = True) -> None:
        with self._file as file:
            if durable:
                os.fsync(file.fileno())
        if durable:
            _sync_folder(self._folder)

    def drop(self) -> None:
        self._file.close()


@cache
def _sender() -> Any:
    """Linux's ``sync_file_range``, which Python does not have; None elsewhere."""
    found = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None
    if found is not None:
        found.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return found


def _send(file: int, start: int, size: int) -> None:
    """Begin to write to the disk, without waiting and without a promise: an error of it comes with fsync."""
    send = _sender()
    if send is not None:
        send(file, start, size, 2)  # SYNC_FILE_RANGE_WRITE


def _sync_folder(folder: Path) -> None:
    at = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(at)
    finally:
        os.close(at)
