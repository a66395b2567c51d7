"""``Staging``: a folder that is there as a whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flex_model.errors import StoreError
from flex_model.store.place import Folder, _sync_folder

__all__ = ["HIDDEN_INDEX", "INDEX", "Sink", "Staging", "staging"]

INDEX, HIDDEN_INDEX = "index.json", ".index.json"  # one of them is in every export
_LOCK = ".lock"


class Staging:
    """Files beside the folder that they are to be. ``sizes``: bytes of those that are finished, by name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folder = Folder(root)
        self.sizes: dict[str, int] = {}

    @contextmanager
    def file(self, name: str) -> Iterator[Sink]:
        """A new file, on the disk for good when the block ends."""
        out = self._folder.appending(name)
        sink = Sink(out)
        try:
            yield sink
        except BaseException:
            out.drop()
            raise
        out.close()
        self.sizes[name] = sink.tell()

    def write(self, name: str, body: Any) -> None:
        """JSON."""
        self._folder.write(name, json.dumps(body, indent=1).encode())


class Sink(io.RawIOBase):
    """What libraries write a file to. They may close it; the block of ``Staging.file`` ends it."""

    def __init__(self, out: Any) -> None:
        self._out, self._bytes = out, 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self._out.append(data)
        self._bytes += size
        return size

    def tell(self) -> int:
        return self._bytes


@contextmanager
def staging(path: str | Path, *, overwrite: bool) -> Iterator[Staging]:
    """The block fills a folder that becomes ``path`` at its end; after an error, or a kill, nothing lies at ``path``.

    What an earlier export of the same path left when it was killed is removed. Raises StoreError where ``path`` is
    taken, another process is exporting to it, or the disk fails.
    """
    if "://" in str(path):
        raise StoreError(f"an export goes to a folder of this machine, got {str(path)!r}.", page="bad-argument")
    target = Path(path).absolute()
    part, old = (target.with_name(f".{target.name}.{what}") for what in ("partial", "replaced"))
    with _telling(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(part, target) as lock:
            try:
                _clean(part, keep=lock)
                _restore(old, target)
                _check_free(target, overwrite=overwrite)
                yield Staging(part)
                _sync_folder(part)
                if target.exists():
                    os.rename(target, old)
                os.rename(part, target)
                _sync_folder(target.parent)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                _restore(old, target)
                raise
            with contextlib.suppress(OSError):  # the export is whole; what stays is hidden, and goes with the next
                (target / _LOCK).unlink()
                shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _locked(part: Path, target: Path) -> Iterator[Path]:
    """The folder is this process's alone; the lock goes with the process."""
    part.mkdir(exist_ok=True)
    path = part / _LOCK
    with path.open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(f"another process is exporting to {target}; wait for it.", page="export-exists") from None
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(lock.fileno())):
            raise StoreError(f"another process has just exported to {target}.", page="export-exists")
        yield path


def _clean(folder: Path, *, keep: Path) -> None:
    for left in folder.iterdir():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        elif left != keep:
            left.unlink()


def _restore(old: Path, target: Path) -> None:
    """After a kill between two renames the old export is still there, or the new one is whole."""
    if old.exists():
        shutil.rmtree(old) if target.exists() else os.rename(old, target)


def _check_free(target: Path, *, overwrite: bool) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise StoreError(f"{target} is there already; give overwrite=True, or another path.", page="export-exists")
    if target.is_symlink() or not any((target / name).is_file() for name in (INDEX, HIDDEN_INDEX)):
        raise StoreError(
            f"{target} is no export (it has no {INDEX}), so that it is not overwritten; remove it yourself.",
            page="export-exists",
        )


@contextmanager
def _telling(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = (error.strerror or str(error)).rstrip(".")
        raise StoreError(
            f"{target} cannot be written: {why}; nothing was left there: put the place right and export again.",
            page="store-place",
        ) from error
