"""What the expressions of an editing function are worth, followed without running them."""

from __future__ import annotations

import ast
import builtins
import sys
from types import FunctionType, ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flex_model.check.notes import Notes
from flex_model.check.source import NOTHING, Target
from flex_model.check.values import UNKNOWN, Mark, Value, either, mixed
from flex_model.check.vocabulary import ABOUT, RANK_NAMES, RANK_VARIABLES, SIZE_VARIABLES, VIEWS, is_container

__all__ = ["Expressions", "spelled"]

_ABOUT = Value(kind="about")
_CONTAINERS = (ast.Tuple, ast.List, ast.Set)


def _kind_of(thing: Any) -> str:
    if isinstance(thing, Tensor):
        return "tensor"
    if isinstance(thing, (bool, int, float, complex)):
        return "number"
    if isinstance(thing, str):
        return "text"
    if isinstance(thing, torch.Generator) or type(thing).__module__.startswith(("numpy.random", "random")):
        return "generator"
    return "none" if thing is None else ""


def attribute_of(thing: Any, name: str) -> Any:
    """An attribute, where looking it up runs nobody's code."""
    if isinstance(thing, (ModuleType, type)):
        return vars(thing).get(name, NOTHING) if isinstance(thing, ModuleType) else getattr(thing, name, NOTHING)
    if isinstance(thing, nn.Module):
        for table in (thing._parameters, thing._buffers, thing._modules):
            if name in table:
                return table[name]
    own = getattr(thing, "__dict__", {}).get(name, NOTHING)
    if own is not NOTHING:
        return own
    of_class = getattr(type(thing), name, NOTHING)
    if isinstance(of_class, FunctionType):
        return of_class.__get__(thing)
    if of_class is NOTHING or isinstance(of_class, property) or type(thing).__module__ == "builtins":
        return NOTHING
    return getattr(thing, name, NOTHING) if callable(of_class) else NOTHING


def spelled(node: ast.AST, most: int = 60) -> str:
    """The source text of an expression; chains of names, which most are, take a hundredth of the time."""
    names: list[str] = []
    inner = node
    while isinstance(inner, ast.Attribute):
        names.append(inner.attr)
        inner = inner.value
    if isinstance(inner, ast.Name):
        return ".".join([inner.id, *reversed(names)])
    return ast.unparse(node)[-most:] if isinstance(node, ast.Attribute) else ast.unparse(node)[:most]


class Expressions:
    """Follows one function. ``depth``: how many calls it is away from the editing function itself."""

    _VISITS: ClassVar[dict[type[ast.AST], str]] = {}

    def __init__(self, notes: Notes, target: Target | None, *, inside: str = "", depth: int = 0) -> None:
        self.notes, self.target, self.inside, self.depth = notes, target, inside, depth
        self.local: dict[str, Value] = {}
        self.escaping: set[str] = set()  # names declared global or nonlocal
        self.guarded = 0  # within code for one rank only
        self.by_rank = self.by_data = 0  # within a branch that ranks may take differently
        self.forked = 0  # within fork_rng
        self.seeded = False  # the generator, by a constant, within it
        self.free: dict[str, Any] = {}
        if target is not None:
            code, cells = target.function.__code__, target.function.__closure__ or ()
            for name, cell in zip(code.co_freevars, cells, strict=False):
                try:
                    self.free[name] = cell.cell_contents
                except ValueError:  # not assigned yet
                    self.free[name] = NOTHING

    # -- names -------------------------------------------------------------------------------------------------
    def outside(self, name: str) -> Value:
        """A name that is not the function's own."""
        if name in self.free:
            thing = self.free[name]
        elif self.target is not None and name in self.target.function.__globals__:
            thing = self.target.function.__globals__[name]
        else:
            thing = getattr(builtins, name, NOTHING)
        return self.of_object(thing, name)

    def of_object(self, thing: Any, spelled: str) -> Value:
        role = "save_ctx" if type(thing).__name__ == "SaveContext" else ""
        return Value(kind=_kind_of(thing), outside=spelled, known=thing, role=role)

    # -- expressions -------------------------------------------------------------------------------------------
    def value(self, node: ast.AST | None) -> Value:
        if node is None:
            return UNKNOWN
        visit = getattr(self, f"on_{type(node).__name__.lower()}", None)
        return self.others(node) if visit is None else visit(node)

    def others(self, node: ast.AST) -> Value:
        """Whatever has no rule: made from the expressions in it."""
        return mixed(*(self.value(n) for n in ast.iter_child_nodes(node) if isinstance(n, ast.expr)))

    def on_constant(self, node: ast.Constant) -> Value:
        return Value(kind=_kind_of(node.value), known=node.value)

    def on_name(self, node: ast.Name) -> Value:
        return self.local[node.id] if node.id in self.local else self.outside(node.id)

    def on_attribute(self, node: ast.Attribute) -> Value:
        base, name = self.value(node.value), node.attr
        if base.kind == "about" and name == "index" and spelled(node).endswith("device.index"):
            return self.mark("FM111", spelled(node), node)
        if base.kind == "about":
            return _ABOUT
        if base.kind == "tensor" or base.of_input:
            if name in ABOUT:
                return _ABOUT
            if name == "data":
                return base.but(beside=base.beside or "." + name, graph=False, known=NOTHING)
            if name in VIEWS or name == "grad":
                return base.but(view=True, known=NOTHING)
            return base.but(kind="", known=NOTHING) if base.of_input else mixed(base)
        if base.outside:
            thing = NOTHING if base.known is NOTHING else attribute_of(base.known, name)
            found = self.of_object(thing, f"{base.outside}.{name}")
            return found.but(role=base.role or found.role, varies=base.varies)
        return base.but(known=NOTHING, node=None)

    def on_subscript(self, node: ast.Subscript) -> Value:
        base, index = self.value(node.value), self.value(node.slice)
        if base.outside in ("os.environ", "environ"):
            return self.variable(index.known, node)
        if base.kind == "about":
            return _ABOUT
        if isinstance(node.value, _CONTAINERS) and isinstance(index.known, int):
            elements = node.value.elts
            if -len(elements) <= index.known < len(elements):
                return self.value(elements[index.known])
        if base.kind == "tensor" or base.is_data:
            chosen = [node.slice] if not isinstance(node.slice, ast.Tuple) else node.slice.elts
            picks = any(isinstance(c, (ast.Compare, ast.List)) or self.value(c).kind == "tensor" for c in chosen)
            if any(self._is_mask(c) for c in chosen):
                self.notes.data(spelled(node), node.lineno, self.inside)
            shared = base.alias and not picks
            return base.but(alias=shared, view=shared, known=NOTHING, varies=base.varies | index.varies)
        if base.outside and base.known is not NOTHING and isinstance(base.known, (dict, list, tuple)):
            element = self._element(base.known, index.known)
            return self.of_object(element, f"{base.outside}[...]").but(role=base.role, varies=index.varies)
        return base.but(kind="" if base.kind == "tuple" else base.kind, varies=base.varies | index.varies, node=None)

    def _is_mask(self, node: ast.expr) -> bool:
        return self.value(node).of_input and self.value(node).cast.startswith("a comparison")

    @staticmethod
    def _element(thing: Any, key: Any) -> Any:
        try:
            return thing[key] if isinstance(key, (str, int)) and type(thing) in (dict, list, tuple) else NOTHING
        except (KeyError, IndexError):
            return NOTHING

    def variable(self, name: Any, node: ast.AST) -> Value:
        """An environment variable."""
        if name in RANK_VARIABLES or name in SIZE_VARIABLES:
            return self.mark("FM111" if name in RANK_VARIABLES else "FM112", f"os.environ[{name!r}]", node)
        return Value(kind="text")

    def mark(self, code: str, what: str, node: ast.AST) -> Value:
        line = getattr(node, "lineno", 0)
        return Value(kind="number", varies=frozenset({Mark(code, what, line, self.inside)}))

    def on_binop(self, node: ast.BinOp) -> Value:
        left, right = self.value(node.left), self.value(node.right)
        kinds = {left.kind, right.kind}
        kind = "tensor" if "tensor" in kinds else left.kind if len(kinds) == 1 else ""
        made = mixed(left, right, kind=kind)
        movers = [v for v in (left, right) if v.of_input]
        cast = all(v.cast and not v.cast.startswith("a comp") for v in movers)  # others are promoted
        return made.but(
            moved=next((v.moved for v in movers if v.moved), ""), cast=movers[0].cast if movers and cast else ""
        )

    def on_unaryop(self, node: ast.UnaryOp) -> Value:
        inner = self.value(node.operand)
        if isinstance(node.op, ast.Not):
            self.asks(inner, node)
            return Value(kind="number", varies=inner.varies)
        return mixed(inner, kind=inner.kind)

    def on_compare(self, node: ast.Compare) -> Value:
        values = [self.value(n) for n in (node.left, *node.comparators)]
        if any(isinstance(op, (ast.Is, ast.IsNot, ast.In, ast.NotIn)) for op in node.ops):
            return Value(kind="number", varies=mixed(*values).varies)
        if any(v.is_data for v in values):
            return mixed(*values, kind="tensor").but(cast="a comparison, which is bool", graph=False)
        marks = mixed(*values).varies | self._rank_by_name(node)
        return Value(kind="number", of_input=any(v.of_input for v in values), varies=marks)

    def _rank_by_name(self, node: ast.Compare) -> frozenset[Mark]:
        """``rank == 0`` with a number from outside."""
        left = node.left
        word = left.id if isinstance(left, ast.Name) else left.attr if isinstance(left, ast.Attribute) else ""
        to_constant = all(isinstance(c, ast.Constant) and isinstance(c.value, int) for c in node.comparators)
        if word not in RANK_NAMES or not to_constant:
            return frozenset()
        value = self.value(left)
        if not value.outside or not isinstance(value.known, int):
            return frozenset()
        return self.mark("FM111", spelled(node), node).varies

    def on_boolop(self, node: ast.BoolOp) -> Value:
        values = [self.value(n) for n in node.values]
        for value in values[:-1]:
            self.asks(value, node)
        return either(*values).but(varies=mixed(*values).varies)

    def on_ifexp(self, node: ast.IfExp) -> Value:
        test = self.value(node.test)
        self.asks(test, node.test)
        with self.branch(test):
            found = either(self.value(node.body), self.value(node.orelse))
        return found.but(varies=found.varies | test.varies)

    def branch(self, test: Value) -> Any:
        raise NotImplementedError

    def asks(self, value: Value, node: ast.AST) -> None:
        """``value`` is asked whether it is true."""
        if value.is_data and value.kind == "tensor":
            self.notes.data(f"the truth of {spelled(node)}", getattr(node, "lineno", 0), self.inside)

    def _sequence(self, node: Any) -> Value:
        inner = [self.value(n) for n in node.elts]
        return mixed(*inner, kind="tuple").but(alias=any(v.alias for v in inner))

    on_tuple = on_list = on_set = _sequence

    def on_dict(self, node: ast.Dict) -> Value:
        return mixed(*(self.value(n) for n in node.values), kind="tuple")

    def on_joinedstr(self, node: ast.JoinedStr) -> Value:
        return mixed(*(self.value(n) for n in node.values), kind="text").but(graph=False)

    def on_formattedvalue(self, node: ast.FormattedValue) -> Value:
        inner = self.value(node.value)
        if inner.is_data and inner.kind == "tensor":
            self.notes.data(f"printing {spelled(node.value)}", node.lineno, self.inside)
        return inner

    def on_lambda(self, node: ast.Lambda) -> Value:
        return Value(kind="function", node=node)

    def on_namedexpr(self, node: ast.NamedExpr) -> Value:
        value = self.value(node.value)
        self.bind(node.target, value)
        return value

    def on_starred(self, node: ast.Starred) -> Value:
        return self.value(node.value)

    def _comprehension(self, node: Any) -> Value:
        for generator in node.generators:
            self.bind(generator.target, self.element_of(self.value(generator.iter)))
            for test in generator.ifs:
                self.asks(self.value(test), test)
        parts = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        return mixed(*(self.value(p) for p in parts), kind="tuple")

    on_listcomp = on_setcomp = on_dictcomp = on_generatorexp = _comprehension

    def element_of(self, value: Value) -> Value:
        """What iterating over ``value`` gives."""
        if value.kind == "tuple":
            return value.but(kind="", known=NOTHING)
        if value.outside and is_container(value.known):
            return Value(outside=value.outside, varies=value.varies, role=value.role)
        return value.but(view=value.alias, known=NOTHING)

    def bind(self, target: ast.AST, value: Value) -> None:
        """A name gets a value."""
        if isinstance(target, ast.Name):
            self.local[target.id] = value
        elif isinstance(target, _CONTAINERS):
            for inner in target.elts:
                self.bind(inner, self.element_of(value))
        elif isinstance(target, ast.Starred):
            self.bind(target.value, value)

    def imported(self, name: str) -> Any:
        """A module, if somebody has imported it."""
        return sys.modules.get(name, NOTHING)
