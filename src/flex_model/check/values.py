"""``Value``: what is known, without running it, of one value in an editing function."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

from flex_model.check.source import NOTHING

__all__ = ["UNKNOWN", "Mark", "Value", "either", "mixed"]


class Mark(NamedTuple):
    """That a value is another one in another process: the code of the finding, what was asked, and where."""

    code: str
    what: str
    line: int
    inside: str = ""  # the helper


@dataclass(frozen=True, slots=True, eq=False)  # what is known may be a tensor, which must not be compared
class Value:
    """``kind``: "tensor", "number", "array", "tuple", "text", "none", "about" (shapes, dtypes), "generator",
    "distribution", "function"; "" where unknown."""

    kind: str = ""
    of_input: bool = False  # its numbers come from the input
    alias: bool = False  # it may share the input's memory
    view: bool = False  # and shows a part of it
    beside: str = ""  # how that memory was reached without autograd: ``.data``
    expanded: bool = False
    graph: bool = False  # holding it holds the input's graph
    moved: str = ""  # the expression that took it to another device
    cast: str = ""  # the expression that gave it another dtype
    outside: str = ""  # how something that outlives the call is spelled
    known: Any = NOTHING  # the object itself
    varies: frozenset[Mark] = frozenset()
    seeded: bool = False  # a generator, by a constant
    role: str = ""  # "save_ctx", "modules", "module"
    node: Any = None  # the definition of a function that is made here
    inputs: bool = False  # the ``*args`` that the editing function is called with

    def but(self, **changes: Any) -> Value:
        return replace(self, **changes)

    @property
    def is_data(self) -> bool:
        """A tensor whose numbers come from the input: asking for its truth is asking for data."""
        return self.of_input and self.kind in ("tensor", "")


UNKNOWN = Value()


def mixed(*values: Value, kind: str = "") -> Value:
    """A new value made from others."""
    return Value(
        kind=kind,
        of_input=any(v.of_input for v in values),
        graph=any(v.graph for v in values),
        moved=next((v.moved for v in values if v.moved), ""),
        cast=next((v.cast for v in values if v.cast), ""),
        varies=frozenset[Mark]().union(*(v.varies for v in values)),
    )


def _either(a: Value, b: Value) -> Value:
    if a is b:
        return a
    return Value(
        kind=a.kind if a.kind == b.kind else "",
        of_input=a.of_input or b.of_input,
        alias=a.alias or b.alias,
        view=a.view or b.view,
        beside=a.beside or b.beside,
        expanded=a.expanded and b.expanded,
        graph=a.graph or b.graph,
        moved=a.moved and b.moved,
        cast=a.cast and b.cast,
        outside=a.outside or b.outside,
        known=a.known if a.known is b.known else NOTHING,
        varies=a.varies | b.varies,
        seeded=a.seeded and b.seeded,
        role=a.role or b.role,
        node=a.node or b.node,
        inputs=a.inputs and b.inputs,
    )


def either(*values: Value) -> Value:
    """One of several values, by which way the function takes."""
    return reduce(_either, values) if values else UNKNOWN
