"""``examine``: reads an editing function before it runs, and says what would go wrong with it on many ranks.

Nothing is run. The source is followed statement by statement (``reader.py``), through helpers one call deep; where
there is no source, the bytecode is looked through (``bytecode.py``).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from flex_model.check.bytecode import scan
from flex_model.check.findings import Finding, finding
from flex_model.check.notes import Notes
from flex_model.check.reader import Reader
from flex_model.check.source import Target, syntax_of, target_of
from flex_model.core.hook_function import HookType, RunMode, adapt_editing_function
from flex_model.core.in_place import may_write
from flex_model.errors import EditWarning, RegistrationError

__all__ = ["examine", "warn_of"]


def examine(
    fn: Callable[..., Any], *, run: RunMode = "every_rank", random: bool = False, hook_type: HookType = "forward"
) -> list[Finding]:
    """What goes wrong with the editing function ``fn`` in parallel code, by line; [] if nothing was found.

    >>> def steer(x):
    ...     return x + torch.randn_like(x)
    >>> [f.code for f in examine(steer)], examine(steer, random=True)
    (['FM121'], [])

    ``run``, ``random`` and ``hook_type`` are what the function is registered with: side effects are right under
    ``run="one_rank"``, say. Each finding has a page, docs/errors/FMxxx.md. What is called by computed names, or hides
    in other packages, is not seen.
    """
    try:
        four = adapt_editing_function(fn, "").uses_context
    except RegistrationError as error:
        line = getattr(getattr(fn, "__code__", None), "co_firstlineno", 0)
        sentence = error.message.removeprefix(": ")
        return [finding("FM101", f"{name_of(fn)}, line {line}: {sentence}", line)]
    target = target_of(fn)
    if target is None:
        return []
    code = target.function.__code__
    early = _of_its_kind(fn, target)
    if early is not None:
        return [early]
    copied = hook_type not in ("forward", "forward_pre") or may_write(fn)
    notes = Notes(name_of(fn), run, random, copied, shards="DTensor" in code.co_names + code.co_freevars)
    syntax = syntax_of(target.function)
    if syntax is None:
        scan(notes, target)
    else:
        Reader(notes, target).read(syntax, target, four=four)
    return sorted(notes.found.values(), key=lambda f: (f.line, f.code))


def name_of(fn: Callable[..., Any]) -> str:
    while hasattr(fn, "func"):
        fn = fn.func
    return getattr(fn, "__qualname__", type(fn).__name__).rpartition("<locals>.")[2]


def _of_its_kind(fn: Callable[..., Any], target: Target) -> Finding | None:
    code, name = target.function.__code__, name_of(fn)
    if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        text = f"{name}, line {code.co_firstlineno}: calling a generator or coroutine runs nothing; use return"
        return finding("FM104", text + ".", code.co_firstlineno)
    if isinstance(fn, nn.Module) and code.co_argcount - 1 - len(target.function.__defaults__ or ()) < 4:
        text = f"{name}: a module's call takes *args, so it gets four arguments; pass lambda x: module(x)."
        return finding("FM101", text, code.co_firstlineno)
    return None


# -- at registration -------------------------------------------------------------------------------------------
_examined: dict[tuple[Any, ...], list[Finding]] = {}


def _key(fn: Callable[..., Any], *more: object) -> tuple[Any, ...] | None:
    """The code that runs, and that of functions that it closes over."""
    target = target_of(fn)
    if target is None:
        return None
    inner: list[CodeType] = []
    for cell in target.function.__closure__ or ():
        try:
            held = cell.cell_contents
        except ValueError:
            continue
        if isinstance(held, FunctionType):
            inner.append(held.__code__)
    return (target.function.__code__, *inner, *more)


def warn_of(fn: Callable[..., Any], run: RunMode, random: bool, hook_type: HookType) -> None:
    """Examine a function that is being registered, once, and emit an ``EditWarning`` for each finding."""
    key = _key(fn, run, random, hook_type)
    if key is None or key in _examined:
        return
    if len(_examined) > 4096:  # a notebook that defines functions for ever
        _examined.clear()
    try:
        found = _examined[key] = examine(fn, run=run, random=random, hook_type=hook_type)
    except Exception:  # reading must never be what keeps an edit from running
        found = _examined[key] = []
    code: CodeType = key[0]
    for one in found:
        warnings.warn_explicit(EditWarning(str(one)), None, code.co_filename, one.line or code.co_firstlineno)
