"""``DatasetSource``: a dataset of Hugging Face's, in memory, streamed, saved in a folder, or by its name."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from flex_model.errors import DataError
from flex_model.texts.items import digest, spread
from flex_model.texts.optional import needed
from flex_model.texts.place import Place
from flex_model.texts.record import columns
from flex_model.texts.source import Source

__all__ = ["DatasetSource", "load_named", "load_saved"]

_ROWS = 256  # read at once


def load_saved(path: Path) -> Any:
    """What ``save_to_disk`` wrote."""
    try:
        return needed("datasets").load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a saved dataset: {str(error).partition(chr(10))[0]}.") from error


def load_named(name: str, *, subset: str | None, split: str) -> Any:
    """From the Hub, as a stream: nothing is downloaded before it is needed."""
    datasets = needed("datasets")
    try:
        return datasets.load_dataset(name, subset, split=split, streaming=True)
    except (OSError, ValueError) as error:  # datasets' own are of these kinds
        why = str(error).partition("\n")[0].rstrip(".")
        raise DataError(f"the dataset {name!r} (split {split!r}) cannot be loaded: {why}.") from error


class DatasetSource(Source):
    """Rows of a ``Dataset`` or an ``IterableDataset``."""

    def __init__(self, dataset: Any, *, name: str, split: str | None) -> None:
        if isinstance(dataset, dict):
            if split not in dataset:
                raise DataError(
                    f"{name}: expected split= to be one of {', '.join(dataset)}, found {split!r}.", page="bad-argument"
                )
            dataset = dataset[split]
        self._name = name
        self._dataset = dataset.with_format(None)
        self.names = [f"{name}[{dataset.split}]" if dataset.split is not None else name]
        self.count = len(dataset) if hasattr(dataset, "__len__") else None

    def records(self, start: Place, wanted: Collection[str]) -> Iterator[tuple[Place, Any]]:
        dataset = self._dataset
        if dataset.column_names is not None:
            dataset = dataset.select_columns(columns(dataset.column_names, wanted, self._name))
        if start.at:
            dataset = dataset.skip(start.at)
        row = start.at
        for batch in dataset.iter(_ROWS):
            names = list(batch)
            for values in zip(*batch.values(), strict=True):
                yield Place(0, row, row), dict(zip(names, values, strict=True))
                row += 1

    def tell(self, place: Place) -> str:
        return f"{self._name}, row {place.line}"

    def identity(self, wanted: Collection[str]) -> list[Any]:
        rows = self._dataset.select_columns(list(wanted)) if self._dataset.column_names is not None else self._dataset
        if self.count is not None:
            return [self.count, digest([rows[i] for i in spread(self.count)])]
        info = self._dataset.info
        first = [{name: row.get(name) for name in wanted} for row in itertools.islice(rows, 1)]
        return [info.dataset_name, info.config_name, str(self._dataset.split), digest(first)]
