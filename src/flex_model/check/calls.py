"""What calling something in an editing function means."""

from __future__ import annotations

import ast
import random as python_random
import weakref
from types import FunctionType
from typing import Any

import torch
from torch import nn

from flex_model.check.expressions import Expressions, spelled
from flex_model.check.source import NOTHING, Syntax, Target, is_library, syntax_of, target_of
from flex_model.check.values import UNKNOWN, Value, either, mixed
from flex_model.check.vocabulary import (
    ABOUT,
    ADDING,
    CHANGING,
    COLLECTIVE_METHODS,
    DRAWING_METHODS,
    RANK_METHODS,
    VIEWS,
    WHOLE_METHODS,
    draws_in_dropout,
    is_container,
    meaning,
    prints_by_name,
    words,
)

__all__ = ["Calls"]

_DTYPES = {"half", "double", "bfloat16", "int", "long", "short", "char", "byte", "bool", "cfloat", "cdouble"}
_SEVERAL = words(
    "split chunk unbind tensor_split topk sort aminmax hsplit vsplit var_mean std_mean broadcast_tensors mode median "
    "kthvalue cummax cummin svd qr eigh slogdet"
)
_NUMBERS = frozenset({float, int, bool, complex})
_MADE_WITH_SEED = (torch.Generator, python_random.Random)


class Given(dict[str, Value]):
    """The arguments of a call: those by position under their numbers, and keywords."""

    def __init__(self, positional: list[Value], keywords: dict[str, Value]) -> None:
        super().__init__(keywords)
        self.positional = positional

    @property
    def all(self) -> list[Value]:
        return [*self.positional, *(v for k, v in self.items() if k not in ("device", "generator"))]

    @property
    def first(self) -> Value:
        return self.positional[0] if self.positional else next(iter(self.values()), UNKNOWN)


class Calls(Expressions):
    def on_call(self, node: ast.Call) -> Value:
        positional = [self.value(a) for a in node.args]
        given = Given(positional, {k.arg or f"**{i}": self.value(k.value) for i, k in enumerate(node.keywords)})
        what = spelled(node.func) + "()"
        function = self.value(node.func) if not isinstance(node.func, ast.Attribute) else None
        base = self.value(node.func.value) if isinstance(node.func, ast.Attribute) else None
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if base is not None and (base.kind == "tensor" or base.of_input):
            return self._of_tensor(node, base, method, given, what)
        if function is None:
            function = self.value(node.func)
        if function.kind == "function":
            return self._of_inner(function, given)
        special = self._special(node, function, base, method, given, what)
        if special is not None:
            return special
        if base is not None and (found := self._of_object(node, base, method, given, what)) is not None:
            return found
        return self._by_object(node, function, base, given, what)

    # -- by what is called -------------------------------------------------------------------------------------
    def _special(
        self, node: ast.Call, function: Value, base: Value | None, method: str, given: Given, what: str
    ) -> Value | None:
        thing, line = function.known, node.lineno
        kind = "" if thing is NOTHING else meaning(thing)
        if kind in ("rank", "size", "process"):
            return self.mark({"rank": "FM111", "size": "FM112", "process": "FM113"}[kind], what, node)
        if thing is NOTHING and method in RANK_METHODS:
            return self.mark("FM111", what, node)
        if what in ("os.getenv()", "getenv()", "os.environ.get()", "environ.get()"):
            return self.variable(given.first.known, node)
        if kind == "collective":
            self.notes.collective(what, line, self.inside, uncertain=self.uncertain)
            return mixed(*given.all, kind="tensor" if given.first.kind == "tensor" else "")
        if kind == "random":
            return self._draws(node, given, what)
        if kind == "other random":
            return self._other_random(node, thing, given, what)
        if kind == "seed":
            if self.forked:
                self.seeded = not mixed(*given.all).varies and bool(given.all)
            else:
                self.notes.seeds(what, line, self.inside)
            self.notes.differs(mixed(*given.all).varies)
            return UNKNOWN
        if kind == "output":
            self.notes.output(what, line, self.inside, guarded=self.guarded > 0)
            return UNKNOWN
        if thing is open or what in ("open()",) or method == "open":
            mode = given.positional[-1].known if len(given.positional) > (1 if thing is open else 0) else NOTHING
            mode = given["mode"].known if "mode" in given else mode
            if isinstance(mode, str) and set(mode) & set("wax+"):
                self.notes.output(what, line, self.inside, guarded=self.guarded > 0)
            return Value(kind="about")
        return None

    @property
    def uncertain(self) -> str:
        return "the rank" if self.by_rank else "the data" if self.by_data and self.notes.run == "sharded" else ""

    def _draws(self, node: ast.Call, given: Given, what: str) -> Value:
        generator = given.get("generator", UNKNOWN)
        made = mixed(*given.all, kind="tensor").but(varies=mixed(*given.all, generator).varies)
        if generator is not UNKNOWN and generator.kind != "none":
            if not generator.seeded:
                self.notes.draws_unseeded(what, node.lineno, self.inside)
            return made
        training = given.get("training", given.positional[2] if len(given.positional) > 2 else UNKNOWN)
        if "dropout" in what and (training.known is False or given.get("p", UNKNOWN).known == 0):
            return made
        if not (self.forked and self.seeded):
            self.notes.draws(what, node.lineno, self.inside)
        return made

    def _other_random(self, node: ast.Call, thing: Any, given: Given, what: str) -> Value:
        name = getattr(thing, "__name__", "")
        if name in ("default_rng", "RandomState", "Random", "SeedSequence", "PCG64", "Generator"):
            constant = bool(given.all) and given.first.kind != "none" and not given.first.outside
            return Value(kind="generator", seeded=constant or given.first.seeded, varies=mixed(*given.all).varies)
        self.notes.draws_unseeded(what, node.lineno, self.inside)
        return Value(kind="number")

    # -- tensors -----------------------------------------------------------------------------------------------
    def _of_tensor(self, node: ast.Call, base: Value, method: str, given: Given, what: str) -> Value:
        line, inside = node.lineno, self.inside
        if method in ABOUT:
            return Value(kind="about")
        if method in ("get_device",):
            return self.mark("FM111", what, node)
        if method in DRAWING_METHODS:
            self._draws(node, Given([], {k: v for k, v in given.items() if k == "generator"}), what)
        if method.endswith("_") and not method.startswith("_") and method not in ("requires_grad_", "retain_grad_"):
            self.write(base, mixed(*given.all), what, line)
            return base
        if method in WHOLE_METHODS and base.of_input:
            if self.notes.run != "sharded":
                self.notes.whole_already(method, line, inside)
            elif method in COLLECTIVE_METHODS and self.uncertain:
                self.notes.collective(what, line, inside, uncertain=self.uncertain)
            elif method == "to_local":
                return base.but(varies=base.varies)
            return base.but(alias=False)
        if method in ("item", "tolist", "numpy", "nonzero", "unique") and base.of_input:
            self.notes.data(what, line, inside)
        if method in ("item", "__float__", "__int__", "__bool__"):
            return Value(kind="number", of_input=base.of_input, varies=base.varies)
        if method == "tolist":
            return Value(kind="tuple", of_input=base.of_input, varies=base.varies)
        if method == "numpy":
            return base.but(kind="array", beside=".numpy()", graph=False, known=NOTHING)
        if method in CHANGING and base.kind != "tensor":  # not a tensor after all
            return mixed(base, *given.all)
        return self._made_by_method(base, method, given, what)

    def _made_by_method(self, base: Value, method: str, given: Given, what: str) -> Value:
        kind = "tensor" if base.kind == "tensor" else base.kind
        varies = base.varies | mixed(*(v for v in given.positional if v.kind != "text")).varies
        if method in _SEVERAL or (method in ("max", "min") and given.all):
            kind = ""
        if method == "to":
            return self._moved(base, given, what).but(known=NOTHING)
        if method in ("cpu", "cuda"):
            return base.but(moved=what if base.of_input else "", known=NOTHING)
        if method == "type_as":
            return base.but(moved="", cast="", known=NOTHING)
        if method == "float":
            return base.but(cast="", known=NOTHING)
        if method in _DTYPES:
            return base.but(cast=what, known=NOTHING)
        if method in ("expand", "expand_as", "broadcast_to"):
            return base.but(expanded=True, view=True, known=NOTHING)
        if method == "detach":
            return base.but(graph=False, known=NOTHING)
        if method in VIEWS:
            return base.but(kind=kind, view=True, known=NOTHING)
        if method in ("eq", "ne", "gt", "ge", "lt", "le", "isnan", "isinf", "isfinite", "logical_not"):
            return mixed(base, kind="tensor").but(cast=f"{what}, which is bool", graph=False)
        made = mixed(base, *given.all, kind=kind)
        return made.but(varies=varies, cast="" if base.cast.startswith("a comp") else base.cast)

    def _moved(self, base: Value, given: Given, what: str) -> Value:
        for name, to in [*enumerate(given.positional), *given.items()]:
            if isinstance(to.known, torch.dtype):
                wide = to.known is torch.float32
                base = base.but(cast="" if wide else f"{what[:-2]}({to.known})")
            elif isinstance(to.known, (str, torch.device)) and name != "copy" and base.of_input:
                base = base.but(moved=f"{what[:-2]}({str(to.known)!r})")
            elif to.kind == "about" or (to.kind == "tensor" and name in (0, "other")):
                base = base.but(moved="", cast="")
        return base

    def write(self, target: Value, value: Value, what: str, line: int) -> None:
        self.notes.write(target, what, line, self.inside)
        if target.alias:
            self.notes.differs(value.varies)
            self.wrote = True

    wrote = False

    # -- objects -----------------------------------------------------------------------------------------------
    def _of_object(self, node: ast.Call, base: Value, method: str, given: Given, what: str) -> Value | None:
        line, owner = node.lineno, base.known
        guarded = self.guarded > 0
        if base.kind == "generator" or isinstance(owner, torch.Generator):
            if method == "manual_seed":
                constant = not mixed(*given.all).varies and not given.first.outside
                return base.but(seeded=constant, varies=base.varies | mixed(*given.all).varies)
            if method not in ("get_state", "set_state", "seed", "initial_seed", "clone_state"):
                if not base.seeded:
                    self.notes.draws_unseeded(what, line, self.inside)
                return Value(kind="array", varies=base.varies)
        if base.kind == "distribution":
            if method in ("sample", "rsample", "sample_n"):
                return self._draws(node, given, what)
            return mixed(base, *given.all, kind="tensor")
        if base.kind == "array" or base.kind == "about":
            return mixed(base, *given.all, kind=base.kind)
        if (base.outside and prints_by_name(what[:-2], owner)) or (base.kind == "file" and method.startswith("write")):
            self.notes.output(what, line, self.inside, guarded=guarded)
            return UNKNOWN
        changes = method in ADDING if owner is NOTHING else method in CHANGING and is_container(owner)
        if changes and base.outside and not base.role:
            self.notes.state(what, line, self.inside, guarded=guarded, kept=mixed(*given.all))
            return UNKNOWN
        if changes or (method in ADDING and not base.outside):
            self.notes.effects += bool(base.role)
            if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                name = node.func.value.id
                if name in self.local and not base.role:  # a container of the function's own
                    held = mixed(base, *given.all, kind=base.kind)
                    self.local[name] = held.but(alias=base.alias or mixed_alias(given))
            return UNKNOWN
        return None

    def _by_object(self, node: ast.Call, function: Value, base: Value | None, given: Given, what: str) -> Value:
        thing, line = function.known, node.lineno
        if isinstance(thing, type) and thing in _NUMBERS:
            if given.first.is_data and given.first.kind == "tensor":
                self.notes.data(what, line, self.inside)
            return Value(kind="number", of_input=given.first.of_input, varies=given.first.varies)
        if thing in _BUILTINS_ABOUT:
            return Value(kind="about")
        if thing in _TEXTS:
            if given.first.is_data and given.first.kind == "tensor":
                self.notes.data(what, line, self.inside)
            return Value(kind="text", of_input=given.first.of_input, varies=given.first.varies)
        if str(getattr(thing, "__module__", "") or "").partition(".")[0] in _WITHOUT_GRAPH:
            return mixed(*given.all).but(graph=False)
        if thing is setattr and given.first.outside and not given.first.role:
            self.notes.state(what, line, self.inside, guarded=self.guarded > 0, kept=mixed(*given.all))
            return UNKNOWN
        if isinstance(thing, type) and issubclass(thing, _MADE_WITH_SEED):
            return Value(kind="generator", seeded=thing is not torch.Generator and bool(given.all))
        if isinstance(thing, type) and thing.__module__.startswith("torch.distributions"):
            return mixed(*given.all, kind="distribution")
        if thing in _SEQUENCES:
            return given.first.but(kind="tuple", known=NOTHING)
        if isinstance(thing, nn.Module):
            return self._of_module(node, thing, given, what)
        if function.role == "modules":
            return mixed(*given.all, kind="tensor")
        if thing is torch.no_grad or not callable(thing):
            return mixed(*([function] if not function.outside else []), *given.all)
        if getattr(thing, "__module__", None) and str(thing.__module__).startswith("torch"):
            return self._of_torch(node, thing, given, what)
        return self._followed(thing, given)

    def _of_module(self, node: ast.Call, module: nn.Module, given: Given, what: str) -> Value:
        dropout = draws_in_dropout(module)
        if dropout:
            self.notes.draws(f"{what}, with a {dropout} in training mode,", node.lineno, self.inside)
        target = target_of(module)
        if target is not None and not is_library(target.function):
            self._followed(module, given)
        return mixed(*given.all, kind="tensor")

    def _of_torch(self, node: ast.Call, thing: Any, given: Given, what: str) -> Value:
        name, first, line = getattr(thing, "__name__", ""), given.first, node.lineno
        if name == "get_device_module" or name == "device":
            return Value(kind="about" if given.first.kind == "about" else "", known=given.first.known)
        if name.endswith("_") and not name.startswith("_"):
            self.write(first, mixed(*given.all[1:]), what, line)
            return first
        if given.get("inplace", UNKNOWN).known is True:
            self.write(first, mixed(*given.all[1:]), f"{what[:-1]}inplace=True)", line)
            return first
        if "out" in given and given["out"].kind != "none":
            self.write(given["out"], mixed(*given.all), f"{what[:-1]}out=)", line)
            return given["out"]
        if name in ABOUT or name in ("is_tensor", "is_grad_enabled", "numel", "is_floating_point"):
            return Value(kind="about")
        if name in ("equal", "allclose", "nonzero", "unique") and any(v.is_data for v in given.all):
            self.notes.data(what, line, self.inside)
        if name in ("equal", "allclose"):
            return Value(kind="number", of_input=mixed(*given.all).of_input, varies=mixed(*given.all).varies)
        if name in VIEWS or name in ("swapaxes",):
            return self._made_by_method(first, name, Given(given.positional[1:], given), what)
        if getattr(torch, name, None) is thing or thing.__module__.startswith("torch.nn.functional"):
            several = name in _SEVERAL or (name in ("max", "min") and len(given.all) > 1)
            made = mixed(*given.all, kind="" if several else "tensor")
            return made.but(cast="" if name in ("where", "masked_fill") or made.cast.startswith("a c") else made.cast)
        return mixed(*given.all)

    # -- functions of the user's own ---------------------------------------------------------------------------
    def _followed(self, thing: Any, given: Given) -> Value:
        """A function that is called, read as the editing function is, if it is the user's and not too far away."""
        target = None if isinstance(thing, type) else target_of(thing)
        if target is None or is_library(target.function) or self.depth >= self.reach(target.function):
            return mixed(*given.all)
        syntax = syntax_of(target.function)
        if syntax is None:
            return mixed(*given.all)
        reader = type(self)(self.notes, target, inside=f"{target.function.__name__}()", depth=self.depth + 1)
        reader.take_state(self)
        reader.bind_parameters(syntax, target, given)
        reader.run(syntax)
        self.wrote |= reader.wrote
        return either(*reader.answers) if reader.answers else Value(kind="none")

    def reach(self, function: FunctionType) -> int:
        """Helpers are followed one call deep; what a decorator wraps is the editing function itself."""
        wrapped = self.target is not None and self.target.function.__dict__.get("__wrapped__") is function
        return 9 if wrapped else 1 + self.wrapped_depth

    wrapped_depth = 0

    def take_state(self, caller: Calls) -> None:
        self.guarded, self.by_rank, self.by_data = caller.guarded, caller.by_rank, caller.by_data
        self.forked, self.seeded = caller.forked, caller.seeded
        inner = caller.target is not None and self.target is not None
        wraps = inner and caller.target.function.__dict__.get("__wrapped__") is self.target.function  # type: ignore[union-attr]
        self.wrapped_depth = caller.wrapped_depth + bool(wraps)
        self.inside = caller.inside if wraps else self.inside
        self.roles = caller.roles

    roles: list[Value]

    def bind_parameters(self, syntax: Syntax, target: Target, given: Given) -> None:
        """A helper's parameters get what it is called with."""
        arguments = syntax.arguments
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
        positional: list[Value] = [] if target.receiver is NOTHING else [self.of_object(target.receiver, "self")]
        positional += [self.of_object(v, "a partial's argument") for v in target.given]
        for value in given.positional:
            positional += self.roles if value.inputs and self.roles else [value]
        if any(v.inputs for v in given.positional):
            self._check_forwarded(syntax, target, names, len(positional))
        everything = mixed(*given.all)
        for name, default in zip(reversed(names), reversed(target.function.__defaults__ or ()), strict=False):
            self.local[name] = self.of_object(default, name)
        for i, name in enumerate(names):
            if i < len(positional):
                self.local[name] = positional[i]
            elif name in given or name not in self.local:
                self.local[name] = given.get(name, everything if any(v.inputs for v in given.all) else UNKNOWN)
        for only in arguments.kwonlyargs:
            self.local[only.arg] = given.get(only.arg, UNKNOWN)
        for star in (arguments.vararg, arguments.kwarg):
            if star is not None:
                self.local[star.arg] = everything.but(kind="tuple")

    def _check_forwarded(self, syntax: Syntax, target: Target, names: list[str], count: int) -> None:
        """``*args`` of a decorator that hides what it wraps: it is called with four arguments."""
        if syntax.arguments.vararg is None and len(names) < count:
            line = target.function.__code__.co_firstlineno
            self.notes.add(
                "FM101",
                line,
                f"{target.function.__name__} gets four arguments, because what wraps it takes *args; let the decorator "
                f"use functools.wraps, or the function take (current_module, inputs, save_ctx, modules)",
            )

    def run(self, syntax: Syntax) -> None:
        raise NotImplementedError

    answers: list[Value]

    def _of_inner(self, function: Value, given: Given) -> Value:
        """A function that is defined within: its body sees the names around it."""
        node = function.node
        if node is None or self.depth > 3:
            return mixed(*given.all)
        arguments = node.args
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
        before = dict(self.local)
        for name, value in zip(names, given.positional, strict=False):
            self.local[name] = value
        answers, self.answers = self.answers, []
        self.depth += 1
        self.nested += 1
        if isinstance(node, ast.Lambda):
            self.answers.append(self.value(node.body))
        else:
            self.statements(node.body)
        self.depth -= 1
        self.nested -= 1
        found, self.answers, self.local = self.answers, answers, before
        return either(*found) if found else Value(kind="none")

    nested = 0

    def statements(self, body: list[ast.stmt]) -> None:
        raise NotImplementedError


def mixed_alias(given: Given) -> bool:
    return any(v.alias for v in given.all)


class _Among:
    """Membership by identity: what is called need not be hashable."""

    def __init__(self, *things: Any) -> None:
        self.things = things

    def __contains__(self, thing: object) -> bool:
        return any(thing is t for t in self.things)


_TEXTS = _Among(str, repr, format)
_WITHOUT_GRAPH = ("numpy", "math", "scipy", "pandas", "sklearn", "statistics", "json")
_SEQUENCES = _Among(tuple, list, dict, set)
_BUILTINS_ABOUT = _Among(len, isinstance, type, hasattr, callable, id, range, issubclass, weakref.ref, weakref.proxy)
