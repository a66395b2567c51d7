"""What of a hook must be the same on every rank, as a line of text; compared when the set of hooks changes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import partial
from types import CodeType
from typing import Any
from zlib import crc32

from flex_model.components.within import Within
from flex_model.core.bound import Bound

__all__ = ["line_of", "mark_of"]


def mark_of(lines: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=12).hexdigest()


def line_of(bound: Bound) -> str:
    """``layers.3 (forward), run='sharded', edit=scale#1f2e3d4c``: only what is not the default."""
    hook = bound.hook
    told = {
        "unpack_idx": None if hook.unpack_idx == 0 else repr(hook.unpack_idx),
        "select": None if hook.select is None else _selection(hook.select),
        "run": None if hook.run == "every_rank" else repr(hook.run),
        "axes": None if hook.axes is None else repr(hook.axes),
        "layout": None if hook.layout is None else str(bound.override),
        "random": "True" if hook.random else None,
        "deliver": None if bound.sink is None and bound.gradient_sink is None else repr(bound.deliver),
        "grad": "True" if bound.gradient_sink is not None else None,
        "attached": "True" if bound.attached else None,
        "edit": None if hook.editing_function is None else _function(hook.editing_function),
    }
    return ", ".join([bound.where, *(f"{k}={v}" for k, v in told.items() if v is not None)])


def _selection(select: Any) -> str:
    if isinstance(select, Within):
        return f"{select.outer!r}, {_selection(select.select)}"
    if callable(select):
        return _function(select)
    return type(select).__name__ if hasattr(select, "shape") else repr(select)


def _function(function: Any) -> str:
    """Its name and a mark of its code. What it closes over is not compared: a rank's own number may be among it."""
    if isinstance(function, partial):
        return f"partial({_function(function.func)})"
    code = getattr(function, "__code__", None)
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return name if code is None else f"{name}#{_code(code):08x}"


def _code(code: CodeType) -> int:
    constants = [f"{_code(c):x}" if isinstance(c, CodeType) else _constant(c) for c in code.co_consts]
    return crc32(repr((code.co_code, code.co_names, constants)).encode())


def _constant(value: object) -> str:
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)
