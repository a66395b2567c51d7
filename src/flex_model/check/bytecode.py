"""What the bytecode of a function shows, where its source is not to be had: less, and less exactly."""

from __future__ import annotations

import ast
import dis
from collections.abc import Iterator
from types import CodeType

from flex_model.check.notes import Notes
from flex_model.check.reader import INPUT, ROLES, Reader
from flex_model.check.source import NOTHING, Target
from flex_model.check.values import Mark

__all__ = ["scan"]

_STARTS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_FAST", "LOAD_CLASSDEREF")
_IGNORED = ("PUSH_NULL", "PRECALL", "KW_NAMES", "CACHE", "EXTENDED_ARG", "NOP", "COPY_FREE_VARS")


def scan(notes: Notes, target: Target) -> None:
    """Every dotted name that is looked up is taken to be called, with nothing known of what it is given."""
    reader = Reader(notes, target)
    code = target.function.__code__
    names = list(code.co_varnames[: code.co_argcount])
    if target.receiver is not NOTHING and names:
        reader.local[names.pop(0)] = reader.of_object(target.receiver, "self")
    names = names[len(target.given) :]
    needed = names[: len(names) - len(target.function.__defaults__ or ())] or names[:1]
    for name, role in zip(needed, ROLES if len(needed) >= 4 else [INPUT], strict=False):
        reader.local[name] = role
    marks: set[Mark] = set()
    for chain, line in _chains(code):
        marks |= _look(reader, chain, line)
    notes.differs(frozenset(marks))
    for name, line in _stored(code):
        notes.state(f"assigning to {name}", line, "", guarded=False, kept=INPUT.but(graph=False))


def _look(reader: Reader, chain: list[str], line: int) -> set[Mark]:
    node: ast.expr = ast.Name(chain[0], ast.Load())
    for attribute in chain[1:]:
        node = ast.Attribute(node, attribute, ast.Load())
    if len(chain) == 1 and (chain[0] in reader.local or chain[0] not in ("print",)):
        thing = reader.value(node).known
        if not callable(thing) or isinstance(thing, type):
            return set()
    call = ast.Call(node, [], [])
    for part in ast.walk(call):
        part.lineno = line  # type: ignore[attr-defined]
    return set(reader.value(call).varies)


def _chains(code: CodeType) -> Iterator[tuple[list[str], int]]:
    """(names joined by dots, line) of what is looked up; a key of os.environ comes after it."""
    chain: list[str] = []
    start = line = code.co_firstlineno
    for instruction in dis.get_instructions(code):
        line = instruction.positions.lineno or line if instruction.positions else line
        name = instruction.opname
        if name in _STARTS:
            if chain:
                yield chain, start
            chain, start = [str(instruction.argval)], line
        elif name in ("LOAD_ATTR", "LOAD_METHOD") and chain:
            chain.append(str(instruction.argval))
        elif name not in _IGNORED:
            if chain:
                yield chain, start
            chain = []
        if isinstance(instruction.argval, CodeType):
            yield from _chains(instruction.argval)
    if chain:
        yield chain, start


def _stored(code: CodeType) -> Iterator[tuple[str, int]]:
    line = code.co_firstlineno
    for instruction in dis.get_instructions(code):
        line = instruction.positions.lineno or line if instruction.positions else line
        if instruction.opname == "STORE_GLOBAL" or (
            instruction.opname == "STORE_DEREF" and instruction.argval in code.co_freevars
        ):
            yield str(instruction.argval), line
