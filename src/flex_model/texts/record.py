"""``Fields`` and ``Form``: which part of a record is its text or its tokens, and which its label."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, Literal

import torch
from torch import Tensor

from flex_model.errors import DataError

__all__ = ["Fields", "Form", "columns", "int_array"]

READY = ("input_ids", "tokens", "token_ids")


def columns(found: Sequence[str], wanted: Collection[str], where: str) -> list[str]:
    """Those of a table's that are wanted."""
    some = [name for name in found if name in wanted]
    if not some:
        raise DataError(
            f"{where}: expected one of the fields {', '.join(wanted)}, found {', '.join(found)}; choose with "
            f"text_field= or tokens_field=."
        )
    return some


@dataclass(frozen=True, slots=True)
class Fields:
    """What the user said of a record's fields."""

    text: str = "text"
    tokens: str | None = None
    label: str | None = None

    def wanted(self) -> list[str]:
        tokens = [self.tokens] if self.tokens else list(READY) if self.text == "text" else []
        return [name for name in (self.text, *tokens, self.label) if name is not None]

    def form(self, record: Any, where: str) -> Form:
        """Of all records, by the first of them."""
        if not isinstance(record, Mapping):
            if self.label is not None:
                raise DataError(
                    f"{where}: label_field={self.label!r} needs records with fields, found {_kind(record)}."
                )
            return Form("text" if isinstance(record, str) else "tokens", None, None)
        if self.tokens is not None:
            return Form("tokens", self.tokens, self.label)
        for name in READY if self.text == "text" else ():
            if _is_ready(record.get(name)):
                return Form("tokens", name, self.label)
        if self.text in record:
            return Form("text", self.text, self.label)
        columns(list(record), self.wanted(), where)
        raise DataError(f"{where}: expected a field {self.text!r}, found {', '.join(map(str, record))}.")


@dataclass(frozen=True, slots=True)
class Form:
    """How each record is read: the record itself (``name`` is None), or one of its fields."""

    kind: Literal["text", "tokens"]
    name: str | None
    label: str | None

    def wanted(self) -> list[str]:
        return [name for name in (self.name, self.label) if name is not None]

    def read(self, record: Any, where: Callable[[], str]) -> tuple[str | array[int], int | array[int] | None]:
        """The text or the token ids (T,), and the label or labels (T,)."""
        value: Any = self._value(record, where)
        if self.kind == "text":
            if not isinstance(value, str):
                raise DataError(f"{where()}: expected a text, found {_kind(value)}.")
            return value, None if self.label is None else self._label(record, None, where)
        ids = int_array(value)
        least = 0 if not ids else int(torch.frombuffer(ids, dtype=torch.int64).min())  # Python's min is slow
        if ids is None or least < 0:
            found = _kind(value) if ids is None else f"the id {least}"
            raise DataError(f"{where()}: expected a list of token ids, found {found}.")
        return ids, None if self.label is None else self._label(record, len(ids), where)

    def _value(self, record: Any, where: Callable[[], str]) -> Any:
        if self.name is None:
            return record
        if not isinstance(record, Mapping):
            raise DataError(f"{where()}: expected a record with the field {self.name!r}, found {_kind(record)}.")
        if self.name not in record:
            raise DataError(
                f"{where()}: expected a field {self.name!r}, found {', '.join(map(str, record)) or 'none'}."
            )
        return record[self.name]

    def _label(self, record: Mapping[str, Any], tokens: int | None, where: Callable[[], str]) -> int | array[int]:
        value = record.get(self.label or "")
        one_label = _int(value)
        if one_label is not None:
            return one_label
        labels = int_array(value)
        if labels is None or tokens is None or len(labels) != tokens:
            one = "an int" if tokens is None else f"an int or {tokens} of them"
            found = _kind(value) if labels is None else f"a list of {len(labels)}"
            raise DataError(f"{where()}: expected the label {self.label!r} to be {one}, found {found}.")
        return labels


def int_array(value: Any) -> array[int] | None:
    """Integers (T,); None for anything else."""
    if isinstance(value, list | tuple):
        if value and isinstance(value[0], bool):
            return None
        try:
            return array("q", value)
        except (TypeError, OverflowError):
            return None
    if not isinstance(value, Tensor) and not hasattr(value, "__array_interface__"):
        return None
    try:
        ids = torch.as_tensor(value)
    except TypeError:  # an array of objects
        return None
    whole = ids.dim() == 1 and ids.dtype is not torch.bool and not ids.is_floating_point() and not ids.is_complex()
    return array("q", ids.tolist()) if whole else None


def _int(value: Any) -> int | None:
    """An int, or what numpy and torch have for one, that fits into 64 bits."""
    try:
        one = index(value) if getattr(value, "ndim", 0) == 0 else None
    except TypeError:
        return None
    return one if one is not None and -(1 << 63) <= one < 1 << 63 else None


def _is_ready(value: Any) -> bool:
    return not isinstance(value, str | Mapping) and int_array(value) is not None


def _kind(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, list | tuple) and value:
        return f"a {type(value).__name__} of {type(value[0]).__name__}"
    return (
        f"{type(value).__name__} {str(value)[:40]!r}" if isinstance(value, str | int | float) else type(value).__name__
    )
