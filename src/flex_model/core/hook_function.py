"""``HookFunction``: what to do at a site, and ``Site``: which place that is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor, nn
from torch.distributed.tensor.placement_types import Placement

from flex_model.errors import RegistrationError

__all__ = ["HOOK_TYPES", "Call", "HookFunction", "HookType", "RunMode", "Site"]

HookType = Literal["forward", "forward_pre", "full_backward", "full_backward_pre", "tensor"]
RunMode = Literal["every_rank", "one_rank", "sharded"]
HOOK_TYPES: tuple[HookType, ...] = get_args(HookType)
LayoutOverride = Mapping[str, Placement] | Sequence[Placement] | Placement


class Site(NamedTuple):
    """One place a tensor passes; also the key of captures whose plain name another hook type took first."""

    name: str
    hook_type: str
    index: int | str = 0  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Call:
    """What an editing function learns of the firing it is part of, by naming the keyword ``call``.

    ``index`` counts forwards of the whole model since wrapping; ``phase`` is ``"decode"`` where a single position runs
    against a cache, else ``"prefill"``; ``positions`` are absolute, ``(S,)`` or ``(B, S)``, or None where unknown.
    ``past`` is how many positions a cache held before this call, and ``attention_mask`` what the model was given as
    such, both of this rank's rows. ``experts``, ``(R,)``: the expert of each row, where the value's rows are tokens at
    experts; else None.
    """

    index: int
    microbatch: int = 0
    phase: Literal["prefill", "decode"] = "prefill"
    positions: Tensor | None = None
    experts: Tensor | None = None
    past: int = 0
    attention_mask: Tensor | None = None


class HookFunction:
    """What to do where a value passes: keep the full tensor, and edit it if there is an editing function.

    >>> HookFunction("model.layers.3.mlp")                                       # keeps the full output
    HookFunction('model.layers.3.mlp')
    >>> HookFunction("lm_head", editing_function=lambda x: x * 2, capture=False) # changes it
    HookFunction('lm_head', edit)

    ``editing_function`` is ``fn(current_module, inputs, save_ctx, modules)`` or ``fn(x)``, gets the full tensor
    whatever the parallelism, and returns a tensor of the same shape or None for "unchanged". It may name the keywords
    ``site`` and ``call``. ``expected_shape`` has one entry a dim, None for "whatever it is"; it is checked.

    ``unpack_idx``: which tensor of the value: a number in flattening order, a keyword or path, several, or ``"all"``.
    ``select``: an index, slice, tuple of them, or function, in global coordinates, applied before anything moves.
    ``run``: ``"every_rank"``, ``"one_rank"`` or ``"sharded"`` (a DTensor; nothing is gathered). Left out, it is what a
    preset of ``flex_model.edits`` says if there is no ``select``, and every rank for others; so with ``random``.
    ``axes``: unshard only these mesh axes. ``layout``: the placements, for what cannot be found out.
    ``random=True``: the edit draws random numbers, the same on every rank and on one process.
    """

    def __init__(
        self,
        module_name: str,
        expected_shape: Sequence[int | None] | None = None,
        editing_function: Callable[..., Any] | None = None,
        unpack_idx: int | str | Sequence[int | str] = 0,
        *,
        capture: bool = True,
        select: Any = None,
        run: RunMode | None = None,
        axes: Sequence[str] | None = None,
        layout: LayoutOverride | None = None,
        random: bool | None = None,
    ) -> None:
        if run is None:  # a selection is put back into the whole
            run = getattr(editing_function, "default_run", "every_rank") if select is None else "every_rank"
        if not isinstance(module_name, str):
            raise RegistrationError(f"module_name must be a string, got {type(module_name).__name__}.")
        if run not in get_args(RunMode):
            known = ", ".join(map(repr, get_args(RunMode)))
            raise RegistrationError(f"HookFunction({module_name!r}): run={run!r} is unknown; expected one of {known}.")
        if expected_shape is not None and not _is_shape(expected_shape):
            raise RegistrationError(
                f"HookFunction({module_name!r}): expected_shape must hold a size or None a dim, got {expected_shape!r}."
            )
        if editing_function is not None and not callable(editing_function):
            raise RegistrationError(
                f"HookFunction({module_name!r}): editing_function must be callable, got {editing_function!r}."
            )
        if not isinstance(unpack_idx, (int, str)):
            unpack_idx = tuple(unpack_idx)
        self.module_name = module_name
        self.expected_shape = None if expected_shape is None else tuple(expected_shape)
        self.editing_function = editing_function
        self.unpack_idx = unpack_idx
        self.capture = capture
        self.select = select
        self.run: RunMode = run  # type: ignore[assignment]
        self.axes = None if axes is None else tuple(axes)
        self.layout = layout
        self.random = bool(getattr(editing_function, "draws_random", False) if random is None else random)

    def __repr__(self) -> str:
        return f"HookFunction({self.module_name!r}{', edit' if self.editing_function else ''})"


def _is_shape(shape: object) -> bool:
    return isinstance(shape, (tuple, list)) and all(
        s is None or (isinstance(s, int) and not isinstance(s, bool) and s >= 0) for s in shape
    )


EditCall = Callable[[nn.Module, Any, Any, Any, Site, "Call | None"], Any]


class Adapted(NamedTuple):
    """An editing function in one calling form; whether it asks for ``call``, and whether it takes the value alone."""

    call: EditCall
    wants_call: bool = False
    value_only: bool = False
    uses_context: bool = False


def adapt_editing_function(fn: Callable[..., Any], where: str) -> Adapted:
    """``fn`` in one calling form, whichever of the accepted ones it has."""
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):  # builtins such as torch.relu do not tell
        return Adapted(lambda module, x, save_ctx, modules, site, call: fn(x), value_only=True)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in positional if p.default is p.empty and p.name not in ("site", "call")]
    star = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    names = {p.name for p in parameters if p.kind is not p.VAR_POSITIONAL}
    extra = [n for n in ("site", "call") if n in names]

    def keywords(site: Site, call: Call | None) -> dict[str, Any]:
        return {n: (site if n == "site" else call) for n in extra}

    wants_call = "call" in extra
    if len(needed) == 4 or (star and not needed):
        return Adapted(
            lambda module, x, save_ctx, modules, site, call: fn(module, x, save_ctx, modules, **keywords(site, call)),
            wants_call,
            uses_context=True,
        )
    if len(needed) == 1 or (not needed and positional):
        if not extra:
            return Adapted(lambda module, x, save_ctx, modules, site, call: fn(x), value_only=True)
        return Adapted(lambda module, x, save_ctx, modules, site, call: fn(x, **keywords(site, call)), wants_call)
    raise RegistrationError(
        f"{where}: the editing function takes {len(needed)} positional arguments "
        f"({', '.join(p.name for p in needed)}); expected fn(current_module, inputs, save_ctx, modules) or fn(x).",
        page="editing-function-arguments",
    )
