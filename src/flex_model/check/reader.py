"""``Reader``: goes through the statements of an editing function and notes what goes wrong."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flex_model.check.calls import Calls
from flex_model.check.expressions import spelled
from flex_model.check.notes import Notes
from flex_model.check.source import NOTHING, Syntax, Target
from flex_model.check.values import UNKNOWN, Mark, Value, either, mixed
from flex_model.check.vocabulary import is_container

__all__ = ["Reader"]

INPUT = Value(kind="tensor", of_input=True, alias=True, graph=True)
ROLES = (Value(role="module"), INPUT, Value(role="save_ctx"), Value(role="modules"))
_NO_TENSOR = {"tuple": "several values", "number": "a number", "text": "a string", "array": "an array"}


class Reader(Calls):
    def __init__(self, notes: Notes, target: Target | None, *, inside: str = "", depth: int = 0) -> None:
        super().__init__(notes, target, inside=inside, depth=depth)
        self.answers: list[Value] = []
        self.roles: list[Value] = []
        self.branches: list[frozenset[Mark]] = []  # what whole branches depend on, if an answer comes of it
        self.last: dict[int, bool] = {}  # by statement: whether it makes something of the input and nothing else

    # -- the whole function ------------------------------------------------------------------------------------
    def read(self, syntax: Syntax, target: Target, *, four: bool) -> None:
        """The editing function itself, which gets ``four`` arguments or the value alone."""
        arguments = syntax.arguments
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
        if target.receiver is not NOTHING:
            self.local[names[0]] = self.of_object(target.receiver, names[0])
            names = names[1:]
        for name, thing in zip(names, target.given, strict=False):
            self.local[name] = self.of_object(thing, name)
        names = [n for n in names[len(target.given) :] if n not in target.keywords]
        defaults = dict(zip(reversed(names), reversed(target.function.__defaults__ or ()), strict=False))
        needed = [n for n in names if n not in defaults and n not in ("site", "call")]
        for name, thing in {**defaults, **(target.function.__kwdefaults__ or {}), **target.keywords}.items():
            self.local[name] = self.of_object(thing, name)
        self.roles = list(ROLES) if four else [INPUT]
        for name, role in zip(needed or names[:1], self.roles, strict=False):
            self.local[name] = role
        if arguments.vararg is not None:
            self.local[arguments.vararg.arg] = INPUT.but(kind="tuple", inputs=True)
        self.run(syntax)
        self._answered()
        self._tail(syntax.body)

    def run(self, syntax: Syntax) -> None:
        self.statements(syntax.body)

    def _answered(self) -> None:
        """What the function's answer depends on, and what it is."""
        if self.wrote or any(a.kind != "none" for a in self.answers):
            for marks in self.branches:
                self.notes.differs(marks)

    def _tail(self, body: list[ast.stmt]) -> None:
        """The last thing on a way to the end without an answer: is it thrown away?"""
        returns = any(a.kind != "none" for a in self.answers)
        if self.wrote or (self.notes.effects and not returns):
            return
        for statement in self._ends(body):
            if self.last.get(id(statement)):
                self.notes.add(
                    "FM102",
                    statement.lineno,
                    f"`{ast.unparse(statement)[:60]}` is the last thing done and its value goes nowhere, so the edit "
                    f"changes nothing; return it",
                )

    def _ends(self, body: list[ast.stmt]) -> Iterator[ast.stmt]:
        last = body[-1] if body else None
        if isinstance(last, ast.If):
            yield from self._ends(last.body)
            yield from self._ends(last.orelse)
        elif isinstance(last, (ast.With, ast.For, ast.While)):
            yield from self._ends(last.body)
        elif last is not None:
            yield last

    # -- statements --------------------------------------------------------------------------------------------
    def statements(self, body: list[ast.stmt]) -> None:
        guarded = self.guarded
        for statement in body:
            self.statement(statement)
        self.guarded = guarded

    def statement(self, node: ast.stmt) -> None:
        visit = getattr(self, f"do_{type(node).__name__.lower()}", None)
        if visit is not None:
            visit(node)
            return
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.value(child)
            elif isinstance(child, ast.stmt):
                self.statement(child)
            elif isinstance(child, (ast.ExceptHandler, ast.match_case)):
                self.statements(child.body)

    def do_return(self, node: ast.Return) -> None:
        value = Value(kind="none") if node.value is None else self.value(node.value)
        self.answers.append(value)
        if self.depth or self.nested or value.kind == "none":
            return
        line, add = node.lineno, self.notes.add
        self.notes.differs(value.varies)
        if value.kind in _NO_TENSOR or (value.kind == "about" and not isinstance(node.value, ast.Call)):
            text, kind = ast.unparse(node)[7:67], _NO_TENSOR.get(value.kind, "no tensor")
            add("FM103", line, f"`{text}` is {kind}; return one tensor of the input's shape, or None for unchanged")
        elif value.of_input and value.moved:
            add(
                "FM106",
                line,
                f"the answer was taken to another device by {value.moved}; end it with .to(x.device)",
            )
        elif value.of_input and value.cast:
            add("FM105", line, f"the answer has another dtype by {value.cast}; end it with .to(x.dtype)")

    def do_expr(self, node: ast.Expr) -> None:
        before = self.notes.effects
        value = self.value(node.value)
        pure = self.notes.effects == before and not isinstance(node.value, (ast.Yield, ast.Await))
        known_pure = value.kind == "tensor" and (not isinstance(node.value, ast.Call) or value.of_input)
        self.last[id(node)] = pure and value.of_input and known_pure and self._from_the_input(node.value)

    def _from_the_input(self, node: ast.expr) -> bool:
        """An expression whose only possible use is its value: arithmetic, or a method of a tensor."""
        if isinstance(node, ast.Call):
            of = node.func.value if isinstance(node.func, ast.Attribute) else None
            return of is not None and self.value(of).kind == "tensor"
        return isinstance(node, (ast.BinOp, ast.UnaryOp, ast.Compare))

    def do_assign(self, node: ast.Assign) -> None:
        before = self.notes.effects
        value = self.value(node.value)
        for target in node.targets:
            self.assign(target, value, node)
        names = all(isinstance(t, ast.Name) and t.id not in self.escaping for t in node.targets)
        dead = names and self.notes.effects == before and value.of_input
        self.last[id(node)] = dead and value.kind == "tensor"

    def do_annassign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.assign(node.target, self.value(node.value), node)

    def assign(self, target: ast.expr, value: Value, node: ast.stmt) -> None:
        if isinstance(target, ast.Name) and target.id not in self.escaping:
            self.bind(target, value)
            return
        line, what = node.lineno, f"`{ast.unparse(node)[:60]}`"
        if isinstance(target, (ast.Tuple, ast.List)):
            parts = node.value.elts if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple) else []
            for i, inner in enumerate(target.elts):
                part = self.value(parts[i]) if len(parts) == len(target.elts) else self.element_of(value)
                self.assign(inner, part, node)
        elif isinstance(target, ast.Name):
            self._state(what, line, value)
            self.bind(target, value)
        elif isinstance(target, ast.Subscript):
            self._store(self.value(target.value), self.value(target.slice), value, what, line, target.value)
        elif isinstance(target, ast.Attribute):
            base = self.value(target.value)
            if base.of_input and target.attr == "data":
                self.write(base.but(beside=".data"), value, what, line)
            elif base.outside or base.role == "module":
                if not base.role or base.role == "module":
                    self._state(what, line, value)
            else:
                self.notes.effects += bool(base.role)

    def _state(self, what: str, line: int, kept: Value) -> None:
        self.notes.state(what, line, self.inside, guarded=self.guarded > 0, kept=kept)

    def _store(self, base: Value, index: Value, value: Value, what: str, line: int, of: ast.expr) -> None:
        """``base[index] = value``."""
        if base.kind in ("tensor", "array") or base.is_data:
            self.write(base.but(view=True), mixed(value, index), what, line)
            if index.of_input and index.cast.startswith("a comp"):
                self.notes.data(what, line, self.inside)
        elif base.outside and not base.role:
            if base.known is NOTHING or is_container(base.known) or base.known is not None:
                self._state(what, line, value)
        elif isinstance(of, ast.Name) and of.id in self.local:
            self.local[of.id] = base.but(graph=base.graph or value.graph, varies=base.varies | value.varies)
        self.notes.effects += bool(base.role)

    def do_augassign(self, node: ast.AugAssign) -> None:
        value, what = self.value(node.value), f"`{ast.unparse(node)[:60]}`"
        target = node.target
        if isinstance(target, ast.Subscript):
            self._store(self.value(target.value), self.value(target.slice), value, what, node.lineno, target.value)
            return
        if isinstance(target, ast.Attribute):
            base = self.value(target.value)
            now = self.value(target)
            if now.kind == "tensor" and now.outside:
                self.write(now, value, what, node.lineno)
            elif base.outside or base.role == "module":
                self._state(what, node.lineno, value) if base.role != "save_ctx" else None
            elif now.of_input and now.kind == "tensor":
                self.write(now, value, what, node.lineno)
            return
        now = self.value(target)
        if now.kind == "tensor" or now.is_data:
            self.write(now, value, what, node.lineno)
            self.bind(target, now.but(varies=now.varies | value.varies, known=NOTHING))
            self.last[id(node)] = now.of_input and not now.alias
        elif target.id in self.escaping:
            self._state(what, node.lineno, value)
        else:
            self.bind(target, mixed(now, value, kind=now.kind))

    # -- ways --------------------------------------------------------------------------------------------------
    @contextmanager
    def branch(self, test: Value) -> Iterator[None]:
        by_rank, by_data = bool(test.varies), test.of_input
        for_one = any(m.code == "FM111" for m in test.varies)
        before = self.by_rank, self.by_data, self.guarded
        self.by_rank += by_rank
        self.by_data += by_data
        self.guarded += for_one
        yield
        self.by_rank, self.by_data, self.guarded = before

    def do_if(self, node: ast.If) -> None:
        test = self.value(node.test)
        self.asks(test, node.test)
        before = dict(self.local)
        with self.branch(test):
            self.statements(node.body)
            first, self.local = self.local, dict(before)
            self.statements(node.orelse)
        self._join(first, test)
        if not test.varies:
            return
        if self._changes(node.body, before) or self._changes(node.orelse, before):
            self.branches.append(test.varies)
        if node.body and isinstance(node.body[-1], (ast.Return, ast.Raise)) and not node.orelse:
            self.guarded += any(m.code == "FM111" for m in test.varies)  # the rest is for the others

    def _join(self, first: dict[str, Value], test: Value) -> None:
        joined = {}
        for name in {**first, **self.local}:
            a, b = first.get(name), self.local.get(name)
            if a is not None and b is not None and a is not b:
                joined[name] = either(a, b).but(varies=a.varies | b.varies | test.varies)
            else:
                joined[name] = a or b or UNKNOWN
        self.local = joined

    @staticmethod
    def _changes(body: list[ast.stmt], before: dict[str, Value]) -> bool:
        """Whether statements do more than tell: an answer, or another value for a name that was there."""
        for statement in body:
            for node in ast.walk(statement):
                if isinstance(node, (ast.Return, ast.AugAssign, ast.Raise)):
                    return True
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in before:
                    return True
                if isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, ast.Store):
                    return True
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr[-1] == "_":
                    return True
        return False

    def do_while(self, node: ast.While) -> None:
        test = self.value(node.test)
        self.asks(test, node.test)
        with self.branch(test):
            self.statements(node.body)
        self.statements(node.orelse)

    def do_for(self, node: ast.For) -> None:
        over = self.value(node.iter)
        self.bind(node.target, self.element_of(over))
        before = dict(self.local)
        with self.branch(over if over.varies else UNKNOWN):
            self.statements(node.body)
        self._join(before, over)
        self.statements(node.orelse)

    def do_assert(self, node: ast.Assert) -> None:
        self.asks(self.value(node.test), node.test)

    def do_raise(self, node: ast.Raise) -> None:
        pass  # an edit that raises says so on every rank

    def do_with(self, node: ast.With) -> None:
        forked = False
        for item in node.items:
            entered = self.value(item.context_expr)
            text = _called(item.context_expr)
            forked |= text.endswith("fork_rng")
            if item.optional_vars is not None:
                opened = text.endswith("open")
                self.bind(item.optional_vars, Value(kind="file") if opened else entered)
        before = self.forked, self.seeded
        self.forked += forked
        self.statements(node.body)
        self.forked, self.seeded = before

    def do_functiondef(self, node: ast.FunctionDef) -> None:
        self.local[node.name] = Value(kind="function", node=node)

    def do_global(self, node: Any) -> None:
        self.escaping |= set(node.names)

    do_nonlocal = do_global

    def do_import(self, node: ast.Import) -> None:
        for alias in node.names:
            name = alias.name if alias.asname else alias.name.partition(".")[0]
            self.local[alias.asname or name] = self.of_object(self.imported(name), name)

    def do_importfrom(self, node: ast.ImportFrom) -> None:
        module = self.imported(node.module or "")
        for alias in node.names:
            thing = NOTHING if module is NOTHING else getattr(module, alias.name, NOTHING)
            self.local[alias.asname or alias.name] = self.of_object(thing, alias.name)


def _called(node: ast.expr) -> str:
    """The name of what is called to enter a block."""
    return spelled(node.func) if isinstance(node, ast.Call) else ""
