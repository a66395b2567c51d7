"""Names of modules and parameters as the plain model spells them, and the patterns that choose among them.

Engines wrap modules (``module.``, ``_fsdp_wrapped_module.``, ``_orig_mod.``, ``_checkpoint_wrapped_module.``), and so
does PEFT (``base_model.model.``). A clean name leaves the wrappers out, so that one script finds the same module under
every engine. A module or parameter that the model holds in several places has all their names; a glob or a predicate
takes it once, under the first name that matches.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakValueDictionary

from torch import nn

from flex_model.core.naming.adapters import has_two_sets, plain_layer, wrapped_model
from flex_model.core.naming.globs import Pattern, glob_to_regex
from flex_model.core.naming.stage_names import StageNames, StageTable
from flex_model.engines import wrapped
from flex_model.errors import NameNotFoundError

__all__ = ["WRAPPERS", "Names"]

# The one child of a wrapper, by the attribute that holds it.
WRAPPERS = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")


def _wrapped_child(module: nn.Module) -> str | None:
    children = module._modules
    for attribute in WRAPPERS:
        if attribute in children:
            return attribute
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return "module"
    return wrapped(module) or wrapped_model(module)


def _never_fires(module: nn.Module) -> bool:
    """Whether the module has no forward, as ModuleList has none: it holds others, and nobody can call it."""
    return getattr(module.forward, "__func__", module.forward) is nn.Module.forward


# These wrappers take themselves out of state_dict's keys.
_ABSENT_FROM_STATE = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def _join(*parts: str) -> str:
    return ".".join(p for p in parts if p)


def _moved(key: str, prefixes: dict[str, str]) -> str:
    """``key`` with its longest module prefix replaced."""
    parts = key.split(".")
    for cut in range(len(parts) - 1, -1, -1):
        head = ".".join(parts[:cut])
        if head in prefixes:
            return _join(prefixes[head], *parts[cut:])
    return key


def _goes_through(name: str, longer: str) -> bool:
    """Whether ``longer`` has all parts of ``name``, in order and others between them."""
    parts = iter(longer.split("."))
    return all(part in parts for part in name.split("."))


def _nowhere(_: nn.Module) -> bool:
    return False


class Names:
    """The clean names of one model, and every other spelling a user may use for them.

    Of a pipeline these are the names on this rank: those of ``parts``, its stages' modules, without what is ``absent``
    (stands in for a module of another stage). ``renamed`` maps a slice's own names to the plain model's.
    """

    def __init__(
        self,
        root: nn.Module,
        *,
        parts: Mapping[int, nn.Module] | None = None,
        absent: Callable[[nn.Module], bool] = _nowhere,
        renamed: Mapping[str, str] | None = None,
    ) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.wrappers: dict[str, list[nn.Module]] = {}  # around the module of a clean name
        self.parameters: dict[str, tuple[nn.Module, str]] = {}  # clean name -> (owner, attribute)
        self.places: dict[str, dict[int, nn.Module]] = {}  # clean name -> this rank's modules of that name by stage
        self.stages = StageNames()
        self._absent, self._renamed = absent, dict(renamed or {})
        self._holders: dict[str, nn.Parameter] = {}  # of parameters that an engine keeps elsewhere
        self._seen: WeakValueDictionary[str, nn.Parameter] = WeakValueDictionary()  # DDP over DTensors takes them out
        self._spellings: dict[str, str] = {}
        self._parameter_spellings: dict[str, str] = {}
        self._state: dict[str, str] = {}  # prefix of plain keys -> that in the wrapped model's state_dict
        self._plain_of: dict[str, str] = {}  # the inverse, of all stages' modules here
        self._plain: dict[str, str] = {}  # raw module name -> what the names of its parameters begin with
        self._prefixes: dict[str, str] = {}  # the same by clean module name
        self._tied: dict[tuple[int, str], tuple[int, str]] = {}  # (id of an owner, attribute) -> the first such place
        self._parameters_on: dict[int, list[str]] = {}  # clean names by stage
        for stage, part in sorted((parts or {0: root}).items()):
            raw = "" if part is root else next(n for n, m in root.named_modules() if m is part)
            self._walk(part, "", raw, raw, "", stage)
        self._inside = self._of_wrappers()
        self._spellings.update({clean: clean for clean in self.modules})  # a plain name goes before a slice's own
        inside = (*self.modules.values(), root)
        self.compiled = any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in inside)
        first: dict[int, str] = {}
        firsts = {n: first.setdefault(id(m), n) for n, m in self.modules.items()}
        self.other_names = {n: f for n, f in firsts.items() if n != f}

    def _walk(self, module: nn.Module, clean: str, raw: str, state: str, plain: str, stage: int) -> None:
        """``plain`` is what names of parameters begin with: an adapted layer's name, also inside the plain layer."""
        if self._absent(module):
            return
        renamed = self._renamed.get(raw, self._renamed.get(clean, clean))
        clean, plain = renamed, plain if renamed == clean else renamed
        self._spellings[raw], self._plain[raw] = clean, plain
        inner = _wrapped_child(module)
        if inner is not None and (child := module._modules[inner]) is not None:
            kept = "" if inner in _ABSENT_FROM_STATE or wrapped(module) else inner
            self.wrappers.setdefault(clean, []).append(module)
            self._walk(child, clean, _join(raw, inner), _join(state, kept), plain, stage)
            if wrapped_model(module) is None:  # PEFT's may hold more, such as a prompt's encoder
                return
        else:
            self._add_module(module, clean, raw, state, plain, stage)
        adapted = plain_layer(module)
        for name, child in module._modules.items():
            if child is None or name == inner:
                continue
            below = plain if name == adapted else _join(plain, name)
            self._walk(child, _join(clean, name), _join(raw, name), _join(state, name), below, stage)
            if name == adapted and not has_two_sets(module):
                self._spell_plainly(_join(clean, name), clean)

    def _add_module(self, module: nn.Module, clean: str, raw: str, state: str, plain: str, stage: int) -> None:
        if plain != clean or plain not in self._state:
            self._state[plain] = state
        self._plain_of[state] = plain
        self._spellings.setdefault(clean, clean)
        self._prefixes.setdefault(clean, plain)
        self.modules.setdefault(clean, module)
        self.places.setdefault(clean, {})[stage] = module
        for name, value in module._parameters.items():
            if value is not None and name != "_flat_param":
                self._add_parameter(module, name, clean, raw, stage)
                self._seen.setdefault(_join(self._prefixes[clean], name), value)

    def _of_wrappers(self) -> str:
        """What wrappers together put before each name: PEFT's ``base_model.model``."""
        deepest = next(r for r, clean in reversed(self._spellings.items()) if not clean)
        return self.strip(deepest) if "" in self._plain else ""

    def _spell_plainly(self, layer: str, plain: str) -> None:
        """The modules of a layer below the adapter on it have the plain model's names, too."""
        for name in [n for n in self.modules if n.startswith(f"{layer}.")]:
            self._spellings.setdefault(plain + name[len(layer) :], name)

    def _add_parameter(self, module: nn.Module, name: str, clean: str, raw: str, stage: int) -> None:
        plain_name = _join(self._prefixes[clean], name)
        self.parameters.setdefault(plain_name, (module, name))
        self._parameters_on.setdefault(stage, []).append(plain_name)
        for spelling in (plain_name, _join(clean, name), _join(raw, name)):
            self._parameter_spellings[spelling] = plain_name

    def add_hidden(self, parameters: Iterable[tuple[nn.Module, str, nn.Parameter]]) -> None:
        """Give names to parameters that their owners do not hold at the moment."""
        owners: dict[int, list[tuple[str, int]]] = {}
        for name, there in self.places.items():
            for stage, module in there.items():
                owners.setdefault(id(module), []).append((name, stage))
        for owner, attribute, holder in parameters:
            for clean, stage in owners[id(owner)]:
                self._add_parameter(owner, attribute, clean, clean, stage)
                self._holders[_join(self._prefixes[clean], attribute)] = holder

    def add_tied(self, pairs: Iterable[tuple[tuple[nn.Module, str], tuple[nn.Module, str]]]) -> None:
        """Pairs of places that hold one parameter, where the objects there do not tell."""
        for (owner, attribute), (first, its) in pairs:
            self._tied[id(owner), attribute] = (id(first), its)

    @property
    def _tied_names(self) -> dict[str, str]:
        """{another name of a parameter on this rank: its first}."""
        first: dict[object, str] = {}
        firsts = {n: first.setdefault(self._held(n), n) for n in self.parameters}
        return {n: f for n, f in firsts.items() if n != f}

    def _held(self, name: str) -> object:
        owner, attribute = self.parameters[name]
        place, held = (id(owner), attribute), owner._parameters.get(attribute)
        return self._tied.get(place, place) if name in self._holders or held is None else id(held)

    # -- of other stages ---------------------------------------------------------------------------------------
    def table(self, coordinate: int) -> list[StageTable]:
        """What other ranks need to know of this rank's stages."""
        stages = sorted({stage for there in self.places.values() for stage in there})
        real = {n for n, m in self.modules.items() if not isinstance(m, nn.Identity)}  # one may fill several places
        same = {n: first for n, first in self.other_names.items() if n in real}
        return [
            StageTable(
                stage,
                coordinate,
                {n: type(there[stage]).__name__ for n, there in self.places.items() if stage in there},
                {n: self.requires_grad(n) for n in self._parameters_on.get(stage, ())},
                frozenset(n for n, there in self.places.items() if stage in there and _never_fires(there[stage])),
                {n: first for n, first in same.items() if stage in self.places[n] and stage in self.places[first]},
                {n: first for n, first in self._tied_names.items() if n in self._parameters_on.get(stage, ())},
            )
            for stage in stages
        ]

    def learn(self, tables: Iterable[StageTable]) -> None:
        """The tables of all stages."""
        self.stages = StageNames(tables)

    def check_collisions(self) -> None:
        """Raises if two stages have the same names."""
        here = {stage for there in self.places.values() for stage in there}
        self.stages.check_collisions(self._renamed.values(), here)

    def everywhere(self, of: str = "module") -> list[str]:
        """All clean names, those of other stages included, in the model's order."""
        return list(self.stages.all(of) or (self.modules if of == "module" else self.parameters))

    def module_of(self, name: str, side: str) -> nn.Module | None:
        """The module of a site; None where it is on another stage."""
        if not self.stages:
            return self.parameters[name][0] if side == "param" else self.modules[name]
        table = self.stages.holder(name, side)
        if table is None:
            return None
        if side == "param":
            return self.parameters[name][0] if name in self._parameters_on.get(table.stage, ()) else None
        return self.places.get(name, {}).get(table.stage)

    def around(self, name: str) -> Iterator[nn.Module]:
        """The modules that hold the one of this name, its wrappers and itself, as they are now: from outside."""
        parts, parent = name.split(".") if name else [], None
        for depth in range(len(parts) + 1):
            here = ".".join(parts[:depth])
            module = self.modules.get(here)
            now = None if parent is None else parent._modules.get(parts[depth - 1])
            if now is not None and _wrapped_child(now) is not None:
                yield now
            yield from self.wrappers.get(here, ())
            if module is not None:
                yield module
            parent = module

    def class_of(self, name: str) -> str:
        """The class of a module, wherever it is."""
        return self.stages.class_of(name) or type(self.modules[name]).__name__

    # -- spellings ---------------------------------------------------------------------------------------------
    def requires_grad(self, name: str) -> bool:
        """Whether the parameter of this clean name will have a gradient."""
        if name not in self.parameters:
            return self.stages.requires_grad(name)
        parameter = self._holders.get(name, self.parameter(name))
        return parameter is not None and parameter.requires_grad

    def parameter(self, name: str) -> nn.Parameter | None:
        """The parameter of this clean name, also where its owner has something else in its place after a forward."""
        owner, attribute = self.parameters[name]
        found = owner._parameters.get(attribute)
        return self._seen.get(name) if found is None else found

    def cleaned(self, pairs: Iterable[tuple[str, Any]], prefix: str) -> Iterator[tuple[str, Any]]:
        """Named parameters or buffers of the wrapped model under their clean names."""
        for raw, value in pairs:
            owner, _, attribute = raw.rpartition(".")
            yield _join(prefix, _join(self._plain.get(owner, owner), attribute)), value

    def plain_key(self, key: str) -> str:
        """A key of the wrapped model's state_dict as the plain model has it."""
        return _moved(key, self._plain_of)

    def wrapped_key(self, key: str) -> str:
        """The inverse of ``plain_key``."""
        return _moved(key, self._state)

    @property
    def root(self) -> nn.Module:
        """The model itself, inside all wrappers."""
        return self.modules[""]

    def clean(self, name: str, *, of: str = "module") -> str:
        """The clean name of ``name`` in any spelling; raises NameNotFoundError with the closest names."""
        spellings = self._spellings if of == "module" else self._parameter_spellings
        plain = self.stages.all(of)  # a slice's own names come after
        found = next((n for n in (name, self.strip(name)) if n in plain), None)
        if found is None:
            found = spellings.get(name, spellings.get(self._relative(name)))
        if found is None:
            raise NameNotFoundError(self._not_found(name, self.everywhere(of), of))
        return found

    def _relative(self, name: str) -> str:
        """``name``, which may be a pattern, without what all wrappers together put before it."""
        name = self.strip(name)
        return name.removeprefix(f"{self._inside}.") if self._inside else name

    @staticmethod
    def strip(name: str) -> str:
        """``name`` without the segments that wrappers add."""
        parts = [p for p in name.split(".") if p not in WRAPPERS]
        while len(parts) > 1 and parts[0] == "module":
            parts = parts[1:]
        return ".".join(parts)

    @staticmethod
    def _not_found(name: str, known: Iterable[str], of: str) -> str:
        known = list(dict.fromkeys(known))
        close = [n for n in known if _goes_through(name, n)][:3]  # a layer that adapters have made two of
        close = close or difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"the closest names are {', '.join(map(repr, close))}" if close else f"it has {len(known)} {of}s"
        return f"{name!r} matches no {of} of the model: {hint}; all names are in fm.wrapped_module_names."

    def match(self, pattern: Pattern, *, of: str = "module") -> list[tuple[str, str]]:
        """(key, clean name) of everything ``pattern`` matches, in the model's order.

        The key is the name as the user spelled it, or the clean name where a glob or a predicate matched.
        """
        if callable(pattern):
            found = self._distinct(pattern, of)
            if not found:
                raise NameNotFoundError(f"the predicate {pattern!r} matches no {of} of the model.")
            return found
        if not isinstance(pattern, str):
            return [pair for single in pattern for pair in self.match(single, of=of)]
        if any(c in pattern for c in "*?["):
            regex = glob_to_regex(self._relative(pattern))
            found = self._distinct(lambda n: bool(n) and regex.fullmatch(n) is not None, of)
            if not found:
                raise NameNotFoundError(self._not_found(pattern, self.everywhere(of), of))
            return found
        return [(pattern, self.clean(pattern, of=of))]

    def _distinct(self, wanted: Callable[[str], bool], of: str) -> list[tuple[str, str]]:
        """Everything of these names, once; without containers that never fire, unless there is nothing else."""
        found = [n for n in self.everywhere(of) if wanted(n)]
        if of == "module":
            found = [n for n in found if not self.never_fires(n)] or found
        others = self.others(of)
        first = {others.get(n, n): n for n in reversed(found)}
        return [(n, n) for n in found if first[others.get(n, n)] == n]

    def others(self, of: str) -> Mapping[str, str]:
        """{another name of a module or parameter: its first name}."""
        if self.stages:
            return self.stages.others(of)
        return self.other_names if of == "module" else self._tied_names

    def never_fires(self, name: str) -> bool:
        told = self.stages.never_fires(name)
        return _never_fires(self.modules[name]) if told is None else told
