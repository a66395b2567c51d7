"""Does an editing function look as if it wrote into its input? Then it is given a copy; others get the live tensor."""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable
from types import CodeType
from typing import Any

__all__ = ["may_write"]


def may_write(fn: Callable[..., Any]) -> bool:
    """Whether the bytecode of ``fn`` stores into an object, or calls a method whose name ends with an underscore.

    >>> may_write(lambda x: x * 2), may_write(lambda x: x.mul_(2))
    (False, True)

    What has no bytecode (modules, builtins) is taken to write. A write in a function that ``fn`` calls is not seen.
    """
    if getattr(fn, "default_run", None) is not None:  # a preset
        return False
    while isinstance(fn, functools.partial):
        fn = fn.func
    code = getattr(getattr(fn, "__func__", fn), "__code__", None)
    return True if code is None else _writes(code)


def _writes(code: CodeType) -> bool:
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE"):
            return True
        if instruction.opname == "BINARY_OP" and instruction.argrepr.endswith("="):
            return True
        if isinstance(instruction.argval, CodeType) and _writes(instruction.argval):
            return True
    return any(n.endswith("_") and not n.startswith("__") for n in code.co_names) or "out" in code.co_names
