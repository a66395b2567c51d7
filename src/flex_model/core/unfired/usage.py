"""What a module's forward does with a child of its own: read from its source, when a hook on the child did not fire."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from torch import nn

__all__ = ["Use", "use_of"]

# Reads of a parameter that compute nothing with it.
_ABOUT = frozenset({"dtype", "device", "shape", "requires_grad", "size", "dim", "ndim", "numel", "element_size"})
# Ways of reaching children without naming them.
_DYNAMIC = frozenset({"getattr", "get_submodule", "attrgetter", "_modules", "children", "named_children", "modules"})
_LOOKS = (ast.Compare, ast.BoolOp, ast.UnaryOp, ast.If, ast.IfExp, ast.Assert)


@dataclass(slots=True)
class Use:
    """How a forward uses a child. All False: its source can be read, and does not name the child."""

    called: bool = False
    sometimes: bool = False  # called within a condition, or after a way out
    one_of_many: bool = False  # called in a loop, or as one of a list: which of them run may depend on the data
    passed: bool = False  # handed to something else, or reached without its name: nothing is known
    method: str = ""  # what is called of it instead of itself: its forward, or another method
    parameter: str = ""  # what of its own is used without it
    parts: bool = False  # its children are used, past it
    reader: str = ""  # the code that this was found in


@functools.lru_cache(maxsize=4096)
def _source(function: Any) -> tuple[ast.AST, ...] | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    _name_parents(tree)
    return tuple(n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))[:1]


def _name_parents(tree: ast.AST) -> None:
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            child.parent = node  # type: ignore[attr-defined]


def _above(node: ast.AST) -> ast.AST:
    return node.parent  # type: ignore[attr-defined,no-any-return]


def _plain(function: Any) -> list[FunctionType]:
    """The functions in one: behind decorators, partials, and what a closure that stands in for a forward holds."""
    found: list[FunctionType] = []
    todo, seen = [function], set()
    while todo:
        f = todo.pop()
        f = getattr(f, "__func__", f)
        if id(f) in seen:
            continue
        seen.add(id(f))
        if isinstance(f, functools.partial):
            todo.append(f.func)
        elif isinstance(f, FunctionType):
            found.append(f)
            cells = [c.cell_contents for c in f.__closure__ or () if _filled(c)]
            todo += [c for c in cells if inspect.isroutine(c) or isinstance(c, functools.partial)]
        inner = (getattr(f, "__wrapped__", None), getattr(f, "_torchdynamo_orig_callable", None))
        todo += [x for x in inner if x is not None]
    return found


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _names(code: CodeType) -> set[str]:
    return set(code.co_names).union(*(_names(c) for c in code.co_consts if isinstance(c, CodeType)))


def _functions(module: nn.Module) -> list[FunctionType]:
    """The code of a module that its forward may run: methods that it names, and what it was put in the place of."""
    kind = type(module)
    todo, found = [module.forward], list[FunctionType]()
    while todo:
        for function in _plain(todo.pop()):
            if function in found or function.__module__ == nn.Module.__module__:
                continue
            found.append(function)
            names = _names(function.__code__)
            todo += [m for n in names if isinstance(m := inspect.getattr_static(kind, n, None), FunctionType)]
            if "super" in names:
                todo += [
                    m for n in names for base in kind.__mro__ if isinstance(m := base.__dict__.get(n), FunctionType)
                ]
            todo += [m for n in names if inspect.ismethod(m := module.__dict__.get(n))]  # accelerate's _old_forward
    return found


def use_of(parent: nn.Module, path: str) -> Use | None:
    """What ``parent``'s code does with its descendant at ``path``, with only containers between them.

    None if some of the code cannot be read.
    """
    use = Use(reader=getattr(module_forward(parent), "__qualname__", type(parent).__name__))
    if isinstance(parent, nn.Sequential) and type(parent).forward is nn.Sequential.forward:
        use.called = True
        return use
    first, *rest = path.split(".")
    unread = False
    for function in _functions(parent):
        names = _names(function.__code__)
        nodes = _source(function)
        if nodes is None:
            unread = True
            continue
        if first not in names:
            use.passed = use.passed or bool(names & _DYNAMIC)
            continue
        for node in nodes:
            _Reading(use, parent, path).read(node, first, rest)
    return None if unread and not (use.called or use.method or use.parameter) else use


def module_forward(module: nn.Module) -> Callable[..., Any]:
    """The function that runs as a module's forward."""
    found = _plain(module.forward)
    return found[0] if found else module.forward


class _Reading:
    """Follows mentions of one child through one function."""

    def __init__(self, use: Use, parent: nn.Module, path: str) -> None:
        self.use = use
        self.child = parent.get_submodule(path)
        self.listed = "." in path

    def read(self, function: ast.AST, first: str, rest: list[str]) -> None:
        mentions = [
            n
            for n in ast.walk(function)
            if isinstance(n, ast.Attribute) and n.attr == first and isinstance(n.value, ast.Name)
        ]
        for node in mentions:
            self.mention(function, node, list(rest))

    def mention(self, function: ast.AST, node: ast.AST, rest: list[str]) -> None:
        """``node`` is the child, or a container on the way to it."""
        above = _above(node)
        while rest and isinstance(above, (ast.Attribute, ast.Subscript)) and above.value is node:
            if isinstance(above, ast.Attribute):
                if above.attr != rest[0]:
                    break
                rest.pop(0)
            elif not isinstance(above.slice, ast.Slice):
                rest.pop(0)
            node, above = above, _above(above)
        if isinstance(above, ast.Subscript) and above.value is node and isinstance(above.slice, ast.Slice):
            node, above = above, _above(above)
        if not rest and self.direct(node, above):
            return
        names = list(_bound_names(node, above))
        if names:
            self.follow(function, names, rest)
        elif not isinstance(above, _LOOKS) and not isinstance(above, ast.Attribute):
            self.use.passed = True

    def direct(self, node: ast.AST, above: ast.AST) -> bool:
        """Whether ``above`` says what is done with the child itself."""
        use = self.use
        if isinstance(above, ast.Call) and above.func is node:
            self.called(above)
            return True
        if not isinstance(above, ast.Attribute):
            return isinstance(above, _LOOKS)
        name, beyond = above.attr, _above(above)
        if name in self.child._parameters or name in self.child._buffers:
            if not (isinstance(beyond, ast.Attribute) and beyond.attr in _ABOUT) and not isinstance(beyond, _LOOKS):
                use.parameter = use.parameter or name
        elif name in self.child._modules:
            use.parts = True
        elif isinstance(beyond, ast.Call) and beyond.func is above and name not in _ABOUT:
            self.use.method = self.use.method if self.use.method == "forward" else name
        return True

    def called(self, call: ast.AST) -> None:
        if _depends(call):
            self.use.sometimes = True
        elif self.listed:
            self.use.one_of_many = True
        self.use.called = True

    def follow(self, function: ast.AST, names: list[str], rest: list[str]) -> None:
        """Names that hold the child, or one of a container's, are used elsewhere in the function."""
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and node.id in names and isinstance(node.ctx, ast.Load):
                above = _above(node)
                if not self.direct(node, above) and not isinstance(above, _LOOKS):
                    self.use.passed = True


def _bound_names(node: ast.AST, above: ast.AST) -> Iterator[str]:
    """The names that an assignment or a loop gives to ``node`` or to what is in it."""
    while isinstance(above, (ast.Call, ast.Attribute, ast.Subscript, ast.Starred, ast.Tuple, ast.IfExp, ast.NamedExpr)):
        if isinstance(above, ast.NamedExpr) and isinstance(above.target, ast.Name):
            yield above.target.id
            return
        if isinstance(above, ast.Call) and above.func is not node and _name_of(above.func) not in _LOOPERS:
            return
        node, above = above, _above(above)
    if isinstance(above, (ast.For, ast.comprehension)) and above.iter is node:
        targets: list[ast.expr] = [above.target]
    elif isinstance(above, ast.Assign) and above.value is node:
        targets = above.targets
    else:
        return
    counted = isinstance(node, ast.Call) and _name_of(node.func) in ("enumerate", "items")
    for target in targets:
        named = [n.id for n in ast.walk(target) if isinstance(n, ast.Name)]
        yield from named[-1:] if counted else named


_LOOPERS = frozenset({"enumerate", "zip", "reversed", "list", "tuple", "iter", "items", "values", "islice", "tqdm"})


def _name_of(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _depends(node: ast.AST) -> bool:
    """Whether what runs ``node`` may be skipped: it is inside of a condition, or comes after a way out."""
    below = node
    while not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        below, node = node, _above(node)
        if isinstance(node, (ast.If, ast.IfExp, ast.While)) and below is not node.test:
            return True
        if isinstance(node, ast.BoolOp) and below is not node.values[0]:
            return True
        if isinstance(node, (ast.Try, ast.Match, ast.ExceptHandler)):
            return True
        body = getattr(node, "body", None)
        if isinstance(body, list) and below in body and any(map(_leaves, body[: body.index(below)])):
            return True
    return False


def _leaves(statement: ast.AST) -> bool:
    ways = (ast.Return, ast.Continue, ast.Break)
    inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    return not isinstance(statement, inner) and any(isinstance(n, ways) for n in ast.walk(statement))
