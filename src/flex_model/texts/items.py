"""``ItemSource``: records that are in memory, or that an iterator or a function makes."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from flex_model.errors import DataError
from flex_model.texts.place import Place
from flex_model.texts.source import Source

__all__ = ["ItemSource", "digest", "spread"]


class ItemSource(Source):
    """A list, another iterable, or a function that returns one. An iterator can be gone through once."""

    def __init__(self, items: Any) -> None:
        self._items = items
        self._once = isinstance(items, Iterator)
        self._first: list[Any] = []  # taken from an iterator to see what it gives
        self._used = False
        self.names = [getattr(items, "__name__", type(items).__name__)]
        self.count = len(items) if _is_list(items) else None

    def records(self, start: Place, wanted: Collection[str]) -> Iterator[tuple[Place, Any]]:
        if self.count is not None:
            items: Iterator[Any] = (self._items[i] for i in range(start.at, self.count))
        else:
            items = itertools.islice(self._begin(), start.at, None)
        for number, item in enumerate(items, start.at):
            yield Place(0, number, number), item

    def _begin(self) -> Iterator[Any]:
        if not self._once:
            yield from self._items() if callable(self._items) else self._items
            return
        if self._used:
            raise DataError(
                "these texts were an iterator, which is used up; give a list, or a function that returns an iterator.",
                page="bad-argument",
            )
        yield from self._first
        self._used = True
        yield from self._items

    def first(self, wanted: Collection[str]) -> list[tuple[Place, Any]]:
        if not self._once:
            return super().first(wanted)
        if not self._first and not self._used:
            self._first = list(itertools.islice(self._items, 1))
        return [(Place(), item) for item in self._first]

    def tell(self, place: Place) -> str:
        return f"item {place.line} of the texts"

    def identity(self, wanted: Collection[str]) -> list[Any]:
        if self.count is not None:
            return [self.count, digest([_part(self._items[i], wanted) for i in spread(self.count)])]
        return [digest([_part(item, wanted) for _, item in self.first(wanted)])]


def _is_list(items: Any) -> bool:
    """A list, a tensor or an array: whatever has a length and items by number."""
    return hasattr(items, "__len__") and hasattr(items, "__getitem__")


def _part(item: Any, wanted: Collection[str]) -> Any:
    return {name: item.get(name) for name in wanted} if isinstance(item, Mapping) else item


def spread(count: int) -> list[int]:
    """Up to 16 numbers below ``count``, with the first and the last."""
    return sorted({(count - 1) * i // 15 for i in range(16)}) if count else []


def digest(records: list[Any]) -> str:
    return hashlib.sha256(json.dumps(records, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else repr(value)
