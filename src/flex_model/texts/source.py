"""``Source``: records in the order of the data, read from any place on; and which source an argument means."""

from __future__ import annotations

import glob
import itertools
import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flex_model.errors import DataError
from flex_model.texts.place import Place

__all__ = ["Source", "open_source"]

_MAGIC = frozenset("*?[")


class Source(ABC):
    """What gives records: strings, mappings, or lists of token ids."""

    names: Sequence[str] = ()  # of files, or of the one thing that it is
    count: int | None = None  # of records, where that is known without reading them

    @abstractmethod
    def records(self, start: Place, wanted: Collection[str]) -> Iterator[tuple[Place, Any]]:
        """Each record from ``start`` on with its place. Columns other than ``wanted`` need not be read."""

    def first(self, wanted: Collection[str]) -> list[tuple[Place, Any]]:
        """The first record, if there is one, to see what the source gives."""
        return list(itertools.islice(self.records(Place(), wanted), 1))

    @abstractmethod
    def tell(self, place: Place) -> str:
        """A place, for a message."""

    @abstractmethod
    def identity(self, wanted: Collection[str]) -> list[Any]:
        """JSON that is another for other data, from samples of what is wanted; paths are no part of it."""


def open_source(source: Any, *, split: str | None, subset: str | None, lines: bool) -> Source:
    """By the kind of the argument: paths, a dataset of Hugging Face's or its name, or any iterable."""
    from flex_model.texts.hub import DatasetSource, load_named, load_saved
    from flex_model.texts.items import ItemSource

    datasets = sys.modules.get("datasets")
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            return DatasetSource(load_saved(path), name=path.name, split=split)
        if split is not None:
            return DatasetSource(load_named(str(source), subset=subset, split=split), name=str(source), split=None)
        return _files([str(source)], lines=lines)
    if datasets is not None and isinstance(
        source, datasets.Dataset | datasets.IterableDataset | datasets.DatasetDict | datasets.IterableDatasetDict
    ):
        return DatasetSource(source, name=type(source).__name__, split=split)
    if _are_paths(source):
        return _files([str(item) for item in source], lines=lines)
    if isinstance(source, bytes | Mapping) or not (isinstance(source, Iterable) or callable(source)):
        raise DataError(
            f"expected a path, a dataset or an iterable of texts or token ids, found {type(source).__name__}.",
            page="bad-argument",
        )
    return ItemSource(source)


def _are_paths(source: Any) -> bool:
    """Whether a list is one of paths: the first of them tells, as far as it is a string."""
    from flex_model.texts.files import has_suffix

    def is_path(item: Any) -> bool:
        if not isinstance(item, str):
            return isinstance(item, Path)
        if len(item) > 1000 or "\n" in item or "\0" in item:
            return False
        return has_suffix(item) or bool(_matches(item)) or Path(item).exists()

    if not isinstance(source, list | tuple) or not source or not is_path(source[0]):
        return False
    for item in source:
        if not is_path(item):
            raise DataError(
                f"expected paths after {str(source[0])!r}, found {str(item)[:80]!r}; give paths alone, or texts alone "
                f"as an iterator.",
                page="bad-argument",
            )
    return True


def _matches(pattern: str) -> list[str]:
    return sorted(glob.glob(pattern, recursive=True)) if _MAGIC & set(pattern) else []


def _files(paths: list[str], *, lines: bool) -> Source:
    """Folders stand for the files of known kinds below them, in the order of their names; patterns too."""
    from flex_model.texts.files import FileSource, file_kind, has_suffix

    found: list[Path] = []
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and has_suffix(p.name))
            some = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]
            kinds = sorted({file_kind(p.name) for p in some})
            if len(kinds) > 1:
                raise DataError(
                    f"{given}: expected files of one kind, found {', '.join(kinds)}; give a pattern, such as "
                    f"{path / ('**/*' + kinds[0])}.",
                    page="bad-argument",
                )
        else:
            some = [path] if path.is_file() else [Path(p) for p in _matches(str(path)) if Path(p).is_file()]
        if not some:
            raise DataError(
                f"{given}: expected a file, a pattern, or a folder with .jsonl, .parquet or .txt files, found none; "
                f"for a dataset's name give split= as well."
            )
        found += some
    return FileSource(found, lines=lines)
