"""How values scale with the number of ranks, followed through the source of a method.

Only what is understood is followed: assignments, products and quotients, shapes, tensors made of sizes, and conditions
on whether the framework is at work. Anything else that a local size went into is a problem by name.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass
from types import CodeType
from typing import Any

__all__ = ["Calls", "Local", "Reader", "names_in"]


@dataclass(frozen=True, slots=True)
class Calls:
    """What the functions of a framework are called, by the last part of their names."""

    sizes: frozenset[str]  # number of ranks
    ranks: frozenset[str]  # this rank
    groups: frozenset[str]
    moves: frozenset[str]  # collectives with gradients

    @property
    def all(self) -> frozenset[str]:
        return self.sizes | self.ranks | self.groups | self.moves


@dataclass(frozen=True, slots=True)
class Local:
    """How a value scales: without the ranks it is its local self times (number of ranks) ** ``power``.

    ``dims``: the same for each size of a shape, or dim of a tensor of that shape. ``is_rank``: it is this rank's
    number. ``is_group``: a process group. ``problem``: why nothing is known.
    """

    power: int = 0
    dims: tuple[int, ...] | None = None
    is_rank: bool = False
    is_group: bool = False
    problem: str = ""

    @property
    def same(self) -> bool:
        """Whether it is what it would be without the ranks."""
        return not (self.power or any(self.dims or ()) or self.is_rank or self.is_group or self.problem)


_SAME = Local()
_KEPT_BY = frozenset({"cuda", "cpu", "to", "half", "float", "bfloat16", "contiguous", "clone", "detach", "int"})
_MADE_BY = frozenset({"zeros", "ones", "empty", "rand", "randn"})
_DIVIDED_BY = frozenset({"divide", "divide_and_check_no_remainder"})
_PASSED_BY = frozenset({"int", "float", "round", "Size", "tuple", "Parameter", "Buffer"})


def names_in(code: CodeType) -> set[str]:
    inner = [names_in(c) for c in code.co_consts if isinstance(c, CodeType)]
    return set(code.co_names).union(*inner)


class Reader:
    """Follows assignments through a method, with ``Local`` in the place of values."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.known: dict[str, Local] = {}  # by source text: "x", "self.x", "args.x"
        self.kept: dict[str, Local] = {}  # attributes of self

    def read(self, method: Any) -> None:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        except (OSError, TypeError, SyntaxError):
            if names_in(method.__code__) & self.calls.all:
                self.kept[""] = Local(problem=f"the source of its {method.__name__} cannot be read")
            return
        self.known = {k: v for k, v in self.known.items() if k.startswith("self.")}
        function = next(n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))
        for statement in function.body:
            self.statement(statement)

    # -- statements ----------------------------------------------------------------------------------------------
    def statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Assign):
            value = self.value(node.value)
            for target in node.targets:
                self.assign(target, value, node.value)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self.assign(node.target, self.value(node.value), node.value)
        elif isinstance(node, ast.AugAssign):
            self.assign(node.target, self.operation(node.target, node.op, node.value), node.value)
        elif isinstance(node, ast.Expr):
            self.expression(node.value)
        elif isinstance(node, ast.If):
            self.branches(node)
        else:
            for inner in (*getattr(node, "body", ()), *getattr(node, "orelse", ()), *getattr(node, "finalbody", ())):
                self.statement(inner)

    def branches(self, node: ast.If) -> None:
        taken = self.truth(node.test)
        if taken is not None:
            for inner in node.body if taken else node.orelse:
                self.statement(inner)
            return
        before = dict(self.known), dict(self.kept)
        for inner in node.body:
            self.statement(inner)
        first = dict(self.known), dict(self.kept)
        self.known, self.kept = dict(before[0]), dict(before[1])
        for inner in node.orelse:
            self.statement(inner)
        self.known, self.kept = self.joined(first[0], self.known), self.joined(first[1], self.kept)

    def joined(self, a: dict[str, Local], b: dict[str, Local]) -> dict[str, Local]:
        return {n: self.either(a.get(n, b.get(n, _SAME)), b.get(n, a.get(n, _SAME))) for n in {**a, **b}}

    def either(self, a: Local, b: Local) -> Local:
        return a if a == b else Local(problem="it depends on a condition whether it is a local size")

    def assign(self, target: ast.expr, value: Local, source: ast.expr) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            parts = source.elts if isinstance(source, (ast.Tuple, ast.List)) else []
            for i, inner in enumerate(target.elts):
                part = self.value(parts[i]) if len(parts) == len(target.elts) else value
                self.assign(inner, part, parts[i] if len(parts) == len(target.elts) else source)
            return
        text = ast.unparse(target)
        self.known[text] = value
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
            self.kept[target.attr] = value

    def expression(self, node: ast.expr) -> None:
        """A call for its effect: ``self.register_buffer("name", value)``, ``self.blocks.append(Block(...))``."""
        if not isinstance(node, ast.Call):
            return
        text = ast.unparse(node.func)
        arguments = [self.value(a) for a in (*node.args, *(k.value for k in node.keywords))]
        if text in ("self.register_buffer", "self.register_parameter") and len(arguments) > 1:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                self.kept[name.value] = self.known[f"self.{name.value}"] = arguments[1]
        elif text.startswith("self.") and text.count(".") > 1:
            owner = text.split(".")[1]
            bad = next((a for a in arguments if not a.same), None)
            if bad is not None:
                self.kept[owner] = Local(problem=bad.problem or "a local size went into it")

    # -- expressions ---------------------------------------------------------------------------------------------
    def truth(self, node: ast.expr) -> bool | None:
        """Tests whether the framework is at work have one answer where this is asked."""
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = self.truth(node.operand)
            return None if inner is None else not inner
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("is_initialized"):
            return True
        return None

    def value(self, node: ast.expr) -> Local:
        if isinstance(node, (ast.Name, ast.Attribute)):
            return self.known.get(ast.unparse(node), _SAME)
        if isinstance(node, ast.BinOp):
            return self.operation(node.left, node.op, node.right)
        if isinstance(node, ast.UnaryOp):
            return self.value(node.operand)
        if isinstance(node, ast.IfExp):
            taken = self.truth(node.test)
            if taken is not None:
                return self.value(node.body if taken else node.orelse)
            return self.either(self.value(node.body), self.value(node.orelse))
        if isinstance(node, ast.Call):
            return self.call(node)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            dims, index = self.value(node.value).dims, node.slice.value
            if dims is not None and isinstance(index, int) and index < len(dims):
                return Local(dims[index])
        if isinstance(node, ast.Starred):
            return self.value(node.value)
        if isinstance(node, (ast.Tuple, ast.List)):
            return self.shape(node, node.elts)
        return self.mixed(node)

    def mixed(self, node: ast.AST) -> Local:
        """Anything else: the same without the ranks if all in it is."""
        parts = [self.value(n) for n in ast.walk(node) if isinstance(n, (ast.Name, ast.Attribute, ast.Call))]
        bad = next((p for p in parts if not p.same), None)
        return _SAME if bad is None else self.unclear(node, bad)

    def unclear(self, node: ast.AST, part: Local) -> Local:
        return part if part.problem else Local(problem=f"`{ast.unparse(node)[:80]}` has a local size in it")

    def operation(self, left: ast.expr, op: ast.operator, right: ast.expr) -> Local:
        a, b = self.value(left), self.value(right)
        if a.same and b.same:
            return _SAME
        node = ast.BinOp(left, op, right)
        if all(x.dims is None and not (x.problem or x.is_rank or x.is_group) for x in (a, b)):
            if isinstance(op, ast.Mult):
                return Local(a.power + b.power)
            if isinstance(op, (ast.FloorDiv, ast.Div)):
                return Local(a.power - b.power)
            if isinstance(op, (ast.Add, ast.Sub)) and a.power == b.power:
                return a
        if isinstance(op, ast.Mult) and (a.is_rank or b.is_rank) and not (a.problem or b.problem):
            return Local(is_rank=True)  # of rank 0 of one it is 0
        return self.unclear(node, a if not a.same else b)

    def call(self, node: ast.Call) -> Local:
        last = ast.unparse(node.func).rpartition(".")[2]
        if last in self.calls.sizes:
            return Local(-1)
        if last in self.calls.ranks:
            return Local(is_rank=True)
        if last in self.calls.groups:
            return Local(is_group=True)
        values = [self.value(a) for a in (*node.args, *(k.value for k in node.keywords))]
        owner = self.value(node.func.value) if isinstance(node.func, ast.Attribute) else _SAME
        if owner.is_group or (last in ("get_world_size", "get_rank") and any(v.is_group for v in values)):
            return Local(is_rank=True) if "rank" in last else Local(-1)
        if all(v.same for v in values) and owner.same:
            return _SAME
        if last in _KEPT_BY and not owner.same:
            return owner
        if last in _PASSED_BY and values and all(v.same for v in values[1:]):
            return values[0]
        if last in _DIVIDED_BY and len(node.args) == 2:
            return self.operation(node.args[0], ast.FloorDiv(), node.args[1])
        if last in _MADE_BY:  # torch.zeros(shape), torch.zeros(*shape) or torch.zeros(a, b)
            first = self.value(node.args[0])
            return first if len(node.args) == 1 and first.dims is not None else self.shape(node, node.args)
        bad = next(v for v in (*values, owner) if not v.same)
        return self.unclear(node, bad)

    def shape(self, node: ast.AST, sizes: list[ast.expr]) -> Local:
        found = [self.value(s) for s in sizes]
        if all(f.same for f in found):
            return _SAME
        bad = next((f for f in found if f.problem or f.is_rank or f.is_group or f.dims is not None), None)
        return self.unclear(node, bad) if bad is not None else Local(dims=tuple(f.power for f in found))
