"""From whatever was given as an editing function to the Python function that will run, and its syntax tree."""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import re
import sysconfig
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

__all__ = ["NOTHING", "Syntax", "Target", "is_library", "syntax_of", "target_of"]


class _Nothing:
    def __repr__(self) -> str:
        return "nothing"


NOTHING: Any = _Nothing()
_LIBRARIES = (
    *{str(Path(p)) for key in ("stdlib", "platstdlib", "purelib", "platlib") if (p := sysconfig.get_path(key))},
    str(Path(__file__).resolve().parents[1]),
    "<frozen",
    "site-packages",
    "dist-packages",
)


@functools.lru_cache(maxsize=1024)
def _of_library(filename: str) -> bool:
    return any(place in filename for place in _LIBRARIES)


def is_library(function: FunctionType) -> bool:
    """Whether a function is torch's, Python's, ours or another package's: not to be looked into."""
    return _of_library(function.__code__.co_filename)


@dataclass(frozen=True, slots=True)
class Target:
    """What runs when an editing function is called; ``given`` and ``keywords`` are what a partial holds."""

    function: FunctionType
    receiver: Any = NOTHING  # of a method, or an object with __call__
    given: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)


def target_of(fn: Callable[..., Any]) -> Target | None:
    """None for what has no Python code: builtins, such as ``torch.relu``."""
    given: tuple[Any, ...] = ()
    keywords: dict[str, Any] = {}
    receiver: Any = NOTHING
    while True:
        if isinstance(fn, functools.partial):
            given, keywords, fn = fn.args + given, {**fn.keywords, **keywords}, fn.func
        elif isinstance(fn, MethodType):
            receiver, fn = fn.__self__, fn.__func__
        elif isinstance(fn, FunctionType):
            inner = fn.__dict__.get("__wrapped__")
            if inner is not None and is_library(fn):  # torch.no_grad and its like
                fn = inner
                continue
            return Target(fn, receiver, given, keywords)
        elif isinstance(fn, type):
            return None
        else:
            call = type(fn).forward if isinstance(fn, nn.Module) else inspect.getattr_static(type(fn), "__call__", None)
            if not isinstance(call, FunctionType):
                return None
            receiver, fn = fn, call


@dataclass(frozen=True, slots=True)
class Syntax:
    """A function's parameters and statements; lines are those of its file."""

    arguments: ast.arguments
    body: list[ast.stmt]


def syntax_of(function: FunctionType) -> Syntax | None:
    """None where the source is not to be had, or is not what runs."""
    code = function.__code__
    try:
        lines = linecache.getlines(code.co_filename, function.__globals__)
        if not lines:
            return None
        return _lambda(code, lines) if code.co_name == "<lambda>" else _def(code, lines)
    except (SyntaxError, ValueError, IndexError, RecursionError):
        return None


def _def(code: CodeType, lines: list[str]) -> Syntax | None:
    first = code.co_firstlineno - 1
    tree = None
    for block in (lambda: lines[first : _last_line(code)], lambda: inspect.getblock(lines[first:])):
        try:
            tree = ast.parse("\n" * first + textwrap.dedent("".join(block())))  # with the file's line numbers
            break
        except SyntaxError:  # the last line with code of its own need not be the last one
            continue
    node = tree.body[0] if tree is not None and tree.body else None
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or node.name != code.co_name:
        return None
    if not _same_names(node.args, code):
        return None
    return Syntax(node.args, node.body)


def _last_line(code: CodeType) -> int:
    ends = [end for _, end, _, _ in code.co_positions() if end is not None]
    return max([code.co_firstlineno, *ends, *(_last_line(c) for c in code.co_consts if isinstance(c, CodeType))])


def _lambda(code: CodeType, lines: list[str]) -> Syntax | None:
    """Several lambdas may share a line: the instructions' positions tell which of them this is."""
    spans = [p for p in code.co_positions() if None not in p and (p[2], p[3]) != (0, 0)]
    if not spans:
        return None
    start_line, start = min((int(p[0] or 0), int(p[2] or 0)) for p in spans)
    end_line, end = max((int(p[1] or 0), int(p[3] or 0)) for p in spans)
    first = code.co_firstlineno
    raw = [line.encode() for line in lines[first - 1 : end_line]]  # positions count bytes
    last = raw[-1][:end]
    body_at = sum(len(line) for line in raw[: start_line - first]) + start
    text = b"".join([*raw[:-1], last])
    words = [m.start() for m in re.finditer(rb"\blambda\b", text) if m.start() < body_at]
    for at in reversed(words):
        above = b"\n" * (first - 1 + text[:at].count(b"\n"))
        for closing in range(4):  # parentheses around the last part have no instruction
            try:
                node = ast.parse(above + b"(" + text[at:] + b")" * (closing + 1), mode="eval").body
            except SyntaxError:
                continue
            if isinstance(node, ast.Lambda) and _same_names(node.args, code):
                answer = ast.copy_location(ast.Return(node.body), node.body)
                return Syntax(node.args, [answer])
            break
    return None


def _same_names(arguments: ast.arguments, code: CodeType) -> bool:
    named = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return named == list(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
