"""``Preset``: an editing function that says how it is run, and knows what it was made of, so that it can be saved.

A factory decorated with ``preset`` returns one: what the factory returns does the edit, the factory's arguments are
what is saved, and its keywords ``positions`` and ``when`` say where the edit applies (``places.py``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flex_model.edits.places import Places
from flex_model.errors import EditError

if TYPE_CHECKING:
    from flex_model.core.hook_function import Call, RunMode
    from flex_model.routing.part import Part

__all__ = ["FACTORIES", "Preset", "compose", "preset"]

P = ParamSpec("P")
FACTORIES: dict[str, Callable[..., Preset]] = {}  # by name: what saved edits are made with again


def _of_the_value(x: Tensor) -> Any: ...
def _of_the_call(x: Tensor, *, call: Any) -> Any: ...
def _of_everything(current_module: Any, inputs: Tensor, save_ctx: Any, modules: Any, *, call: Any) -> Any: ...


class Preset:
    """A ready-made editing function. Made by the functions of ``flex_model.edits``.

    >>> from flex_model import edits
    >>> double = edits.scale(2.0)
    >>> double, double(torch.ones(2)).tolist()
    (edits.scale(2.0), [2.0, 2.0])

    ``default_run`` is the run mode it has where none is given, and ``draws_random`` whether it draws random numbers.
    ``takes_modules``: it edits with the trainable modules.
    """

    def __init__(
        self,
        kind: str,
        arguments: Mapping[str, Any],
        edit: Callable[..., Any],
        *,
        run: RunMode = "sharded",
        random: bool = False,
        takes_modules: bool = False,
        by_parts: bool = False,
        places: Places | None = None,
    ) -> None:
        self.kind, self.arguments = kind, dict(arguments)
        self.default_run, self.draws_random, self.takes_modules = run, random, takes_modules
        self._edit, self._places = edit, places if places is not None and places.some else None
        self._by_parts = by_parts
        form = _of_everything if takes_modules else _of_the_value if self._places is None else _of_the_call
        self.__signature__ = inspect.signature(form)
        self.__qualname__ = f"edits.{kind}({', '.join(f'{k}={_told(v)}' for k, v in self.arguments.items())})"

    def __call__(self, *given: Any, call: Call | None = None) -> Any:
        x: Tensor = given[1] if self.takes_modules else given[0]
        if self._places is not None and not self._places.now(call):
            return None
        new = self._edit(x, given[3]) if self.takes_modules else self._edit(x)
        if new is None or self._places is None:
            return new
        where = self._places.mask(x, call)
        return new if where is None else torch.where(where, new, x)

    @property
    def alike(self) -> bool:
        """Made of numbers and tensors alone, so that what fails on one rank fails on all."""
        return not (self.draws_random or self.takes_modules or self._places) and _is_plain(self.arguments)

    @property
    def by_parts(self) -> bool:
        """Whether it can be made on a rank's own part as a plain tensor."""
        return self._by_parts and self.alike

    def on_part(self, x: Tensor, part: Part) -> Tensor:
        """The edit of ``x``, which is that ``part`` of the value. Raises NeedsTheWhole where that cannot be done."""
        new: Tensor = self._edit(x, part)
        return new

    def __repr__(self) -> str:
        defaults = inspect.signature(FACTORIES[self.kind]).parameters if self.kind in FACTORIES else {}
        told = []
        for i, (name, value) in enumerate(self.arguments.items()):
            default = defaults[name].default if name in defaults else inspect.Parameter.empty
            if value is not default and not (isinstance(value, (int, float, str)) and value == default):
                told.append(_told(value) if i == 0 else f"{name}={_told(value)}")
        return f"edits.{self.kind}({', '.join(told)})"


def _is_plain(value: Any) -> bool:
    """Whether it is the same on all ranks by its nature: nothing that is looked up, called, drawn or trained."""
    if isinstance(value, (list, tuple, Mapping)):
        return all(map(_is_plain, value.values() if isinstance(value, Mapping) else value))
    if isinstance(value, Tensor):
        return type(value) is Tensor and not value.requires_grad
    return value is None or isinstance(value, (bool, int, float, str, slice))


def _told(value: Any) -> str:
    if isinstance(value, DTensor):
        return f"DTensor{tuple(value.shape)}"
    if isinstance(value, Tensor):
        return f"Tensor{tuple(value.shape)}"
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_told, value))}]"
    if getattr(type(value), "__repr__", None) is object.__repr__:
        return type(value).__name__
    return getattr(value, "__qualname__", None) or repr(value)


def preset(
    *, run: RunMode = "sharded", random: bool = False, takes_modules: bool = False, by_parts: bool = False
) -> Callable[[Callable[P, Callable[..., Any]]], Callable[P, Preset]]:
    """Make a factory of editing functions one of presets. ``by_parts``: they take the part that they are given, too."""

    def decorate(factory: Callable[P, Callable[..., Any]]) -> Callable[P, Preset]:
        signature = inspect.signature(factory)

        @wraps(factory)
        def make(*args: P.args, **kwargs: P.kwargs) -> Preset:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            arguments = dict(bound.arguments)
            places = Places(arguments.get("positions"), arguments.get("when", "all"))
            edit = factory(*args, **kwargs)
            return Preset(
                factory.__name__,
                arguments,
                edit,
                run=run,
                random=random,
                takes_modules=takes_modules,
                by_parts=by_parts,
                places=places,
            )

        FACTORIES[factory.__name__] = make
        return make

    return decorate


def compose(*edits: Callable[..., Any]) -> Preset:
    """Several edits of one value, in this order; each sees what the one before returned.

    >>> from flex_model import edits
    >>> edits.compose(edits.scale(2.0), edits.clamp(max=3.0))(torch.tensor([1.0, 2.0])).tolist()
    [2.0, 3.0]

    It runs sharded if all of them can, else on every rank.
    """
    presets = [e for e in edits if isinstance(e, Preset)]
    if len(presets) < len(edits) or not edits:
        other = next((e for e in edits if not isinstance(e, Preset)), None)
        raise EditError(
            f"edits.compose takes presets, got {'nothing' if other is None else _told(other)}; "
            f"call a function of your own from one of your own.",
            page="preset-arguments",
        )
    modules = any(e.takes_modules for e in presets)

    def edit(x: Tensor, held: Any = None, call: Any = None) -> Tensor:
        for one in presets:
            new = one(None, x, None, held, call=call) if one.takes_modules else one(x, call=call)
            x = x if new is None else new
        return x

    runs = {e.default_run for e in presets}
    out = Composed("compose", {"edits": list(edits)}, edit, takes_modules=modules)
    out.default_run = "sharded" if runs == {"sharded"} else "every_rank"
    out.draws_random = any(e.draws_random for e in presets)
    out.__signature__ = inspect.signature(_of_everything if modules else _of_the_call)
    return out


class Composed(Preset):
    def __call__(self, *given: Any, call: Call | None = None) -> Any:
        if self.takes_modules:
            return self._edit(given[1], given[3], call)
        return self._edit(given[0], None, call)

    @property
    def alike(self) -> bool:
        return all(one.alike for one in self.arguments["edits"])

    @property
    def by_parts(self) -> bool:
        return all(one.by_parts for one in self.arguments["edits"])

    def on_part(self, x: Tensor, part: Part) -> Tensor:
        for one in self.arguments["edits"]:
            x = one.on_part(x, part)
        return x


FACTORIES["compose"] = lambda edits: compose(*edits)
