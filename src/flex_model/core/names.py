"""Names of modules and parameters as the plain model spells them, and the patterns that choose among them.

Engines wrap modules (``module.``, ``_fsdp_wrapped_module.``, ``_orig_mod.``, ``_checkpoint_wrapped_module.``).
A clean name leaves the wrappers out, so that one script finds the same module under every engine.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from flex_model.errors import NameNotFoundError

__all__ = ["Names", "Pattern", "glob_to_regex"]

Pattern = str | Iterable[str] | Callable[[str], bool]

# The one child of a wrapper, by the attribute that holds it.
_WRAPPERS = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")


def _wrapped_child(module: nn.Module) -> str | None:
    children = module._modules
    for attribute in _WRAPPERS:
        if attribute in children:
            return attribute
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return "module"
    return None


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


def glob_to_regex(pattern: str) -> re.Pattern[str]:
    """``*`` and ``?`` stay within one part of a dotted name, ``**`` crosses dots, ``[01]`` is a set.

    >>> bool(glob_to_regex("layers.*.mlp").fullmatch("layers.3.mlp"))
    True
    >>> bool(glob_to_regex("layers.*").fullmatch("layers.3.mlp"))
    False
    """
    out = []
    for token in re.findall(r"\*\*|\*|\?|\[[^\]]*\]|.", pattern):
        if token == "**":
            out.append(".*")
        elif token == "*":
            out.append("[^.]*")
        elif token == "?":
            out.append("[^.]")
        elif token.startswith("[") and len(token) > 1:
            out.append(token.replace("[!", "[^", 1))
        else:
            out.append(re.escape(token))
    return re.compile("".join(out))


class Names:
    """The clean names of one model, and every other spelling a user may use for them."""

    def __init__(self, root: nn.Module) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.parameters: dict[str, tuple[nn.Module, str]] = {}  # clean name -> (owner, attribute)
        self._holders: dict[str, nn.Parameter] = {}  # of parameters that an engine keeps elsewhere
        self._spellings: dict[str, str] = {}
        self._parameter_spellings: dict[str, str] = {}
        self._state: dict[str, str] = {}  # clean module name -> its prefix in the wrapped model's state_dict
        self._walk(root, "", "", "")

    def _walk(self, module: nn.Module, clean: str, raw: str, state: str) -> None:
        self._spellings.setdefault(raw, clean)
        inner = _wrapped_child(module)
        if inner is not None and (child := module._modules[inner]) is not None:
            kept = "" if inner in _ABSENT_FROM_STATE else inner
            self._walk(child, clean, _join(raw, inner), _join(state, kept))
            return
        self._state[clean] = state
        self._spellings.setdefault(clean, clean)
        self.modules[clean] = module
        for name, value in module._parameters.items():
            if value is not None and name != "_flat_param":
                self._add_parameter(module, name, clean, raw)
        for name, child in module._modules.items():
            if child is not None:
                self._walk(child, _join(clean, name), _join(raw, name), _join(state, name))

    def _add_parameter(self, module: nn.Module, name: str, clean: str, raw: str) -> None:
        clean_name = _join(clean, name)
        self.parameters[clean_name] = (module, name)
        self._parameter_spellings[clean_name] = clean_name
        self._parameter_spellings[_join(raw, name)] = clean_name

    def add_hidden(self, parameters: Iterable[tuple[nn.Module, str, nn.Parameter]]) -> None:
        """Give names to parameters that their owners do not hold at the moment."""
        owners = {id(m): n for n, m in self.modules.items()}
        for owner, attribute, holder in parameters:
            clean = owners[id(owner)]
            self._add_parameter(owner, attribute, clean, clean)
            self._holders[_join(clean, attribute)] = holder

    def requires_grad(self, name: str) -> bool:
        """Whether the parameter of this clean name will have a gradient."""
        owner, attribute = self.parameters[name]
        parameter = self._holders.get(name, owner._parameters.get(attribute))
        return parameter is not None and parameter.requires_grad

    def cleaned(self, pairs: Iterable[tuple[str, Any]], prefix: str) -> Iterator[tuple[str, Any]]:
        """Named parameters or buffers of the wrapped model under their clean names."""
        for raw, value in pairs:
            owner, _, attribute = raw.rpartition(".")
            yield _join(prefix, _join(self._spellings.get(owner, owner), attribute)), value

    def plain_key(self, key: str) -> str:
        """A key of the wrapped model's state_dict as the plain model has it."""
        inverse = {state: clean for clean, state in self._state.items()}
        return _moved(key, inverse)

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
        found = spellings.get(name)
        if found is None:
            found = spellings.get(self.strip(name))
        if found is None:
            raise NameNotFoundError(self._not_found(name, spellings.values(), of))
        return found

    @staticmethod
    def strip(name: str) -> str:
        """``name`` without the segments that wrappers add."""
        parts = [p for p in name.split(".") if p not in _WRAPPERS]
        while len(parts) > 1 and parts[0] == "module":
            parts = parts[1:]
        return ".".join(parts)

    @staticmethod
    def _not_found(name: str, known: Iterable[str], of: str) -> str:
        known = list(dict.fromkeys(known))
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"the closest names are {', '.join(map(repr, close))}" if close else f"it has {len(known)} {of}s"
        return f"{name!r} matches no {of} of the model: {hint}; all names are in fm.wrapped_module_names."

    def match(self, pattern: Pattern, *, of: str = "module") -> list[tuple[str, str]]:
        """(key, clean name) of everything ``pattern`` matches, in the model's order.

        The key is the name as the user spelled it, or the clean name where a glob or a predicate matched.
        """
        if callable(pattern):
            table = self.modules if of == "module" else self.parameters
            found = [(n, n) for n in table if pattern(n)]
            if not found:
                raise NameNotFoundError(f"the predicate {pattern!r} matches no {of} of the model.")
            return found
        if not isinstance(pattern, str):
            return [pair for single in pattern for pair in self.match(single, of=of)]
        if any(c in pattern for c in "*?["):
            regex = glob_to_regex(self.strip(pattern))
            table = self.modules if of == "module" else self.parameters
            found = [(n, n) for n in table if n and regex.fullmatch(n)]
            if not found:
                raise NameNotFoundError(self._not_found(pattern, table, of))
            return found
        return [(pattern, self.clean(pattern, of=of))]
