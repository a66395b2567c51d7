"""Editing functions and selections of the fuzz tests, by name, so that a case is data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Answer = Tensor | None


def _mul(x: Tensor) -> Tensor:
    return x.mul_(1.5)


def _add(x: Tensor) -> None:
    x.add_(0.5)


def _first(x: Tensor) -> Tensor:
    x[..., :1] = 0.5
    return x


def _rows(x: Tensor) -> None:
    x[:1] *= 3


# Everywhere: right on any part of the value. Last: mixes along the last dim. Whole: mixes along any dim.
EVERYWHERE: dict[str, Callable[[Tensor], Answer]] = {
    "double": lambda x: x * 2,
    "tanh": lambda x: torch.tanh(x) + 0.3 * x,
    "shift": lambda x: x + 0.7,
    "same": lambda x: x,
    "nothing": lambda x: None,
    "constant": lambda x: torch.full_like(x, 0.25),
    "cut": lambda x: x.detach() * 1.5,
    "mul_": _mul,
    "add_": _add,
}
LAST: dict[str, Callable[[Tensor], Answer]] = {
    "centre": lambda x: x - 0.5 * x.mean(-1, keepdim=True),
    "softmax": lambda x: torch.softmax(x, -1) + x,
    "flip": lambda x: x.flip(-1) + x,
    "cumsum": lambda x: x.cumsum(-1) * 0.3,
    "write first": _first,
}
WHOLE: dict[str, Callable[[Tensor], Answer]] = {
    "batch mean": lambda x: x - 0.5 * x.mean(0, keepdim=True),
    "batch flip": lambda x: x.flip(0) + 0.5 * x,
    "all mean": lambda x: x + x.mean(),
    "norm": lambda x: x / (1 + x.norm()),
    "roll": lambda x: x.roll(1, 0) * 0.5 + x,
    "middle": lambda x: x + 0.3 * x.mean(x.dim() // 2, keepdim=True),
    "write rows": _rows,
}
PURE = {**EVERYWHERE, **LAST, **WHOLE}
IN_PLACE = ("mul_", "add_", "write first", "write rows")
CONTEXTUAL = ("odd calls", "trainable", "random", "saves", "uses saved")
READ_ONLY = ("nothing", "saves")


def answer(name: str, x: Tensor, call: Any = None, save_ctx: Any = None, modules: Any = None) -> Answer:
    """What the editing function ``name`` does with ``x``, wherever it is called from."""
    if name == "odd calls" and call.index % 2 == 0:
        return None
    if not x.is_floating_point():  # whole numbers and booleans are turned around, for want of anything else to do
        return x.flip(-1) if name in WHOLE and x.dim() else None
    if name == "saves":
        save_ctx.mean = x.mean()
        return None
    if name == "uses saved":
        return x * 0.9 if getattr(save_ctx, "mean", None) is None else x + save_ctx.mean
    if name == "random":
        return x + torch.randn_like(x) * 0.5
    if name == "trainable":
        gain, probe = modules["gain"], modules["probe"]
        out = x * gain.weight[0, 0] + gain.bias[0]
        return probe(out) if x.dim() and x.shape[-1] == probe.weight.shape[1] else out
    return PURE["double" if name == "odd calls" else name](x)


def editor(name: str) -> Callable[..., Any]:
    """The editing function as it is registered, in the form that fits it."""
    if name == "odd calls":
        return lambda x, call: answer(name, x, call)
    if name in ("saves", "uses saved", "trainable"):
        return lambda module, inputs, save_ctx, modules: answer(name, inputs, None, save_ctx, modules)
    if name not in IN_PLACE:
        return lambda x: answer(name, x)

    def in_place(x: Tensor) -> Answer:  # must look as if it wrote: the write itself is in another function
        if x.is_floating_point():
            x[...] = x
        return answer(name, x)

    return in_place


# -- selections ------------------------------------------------------------------------------------------------
Select = tuple[Any, ...]  # ("index", index) or ("function", name)
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {  # (function, whether its result is a part)
    "last": (lambda x: x[..., -1], True),
    "first rows": (lambda x: x[:2], True),
    "transposed": (lambda x: x.transpose(0, -1), True),
    "every other": (lambda x: x[..., ::2], True),
    "gathered": (lambda x: x[..., [0, -1]], True),
    "turned over": (lambda x: x.flip(0)[:1], True),
    "mean": (lambda x: x.mean(-1) if x.is_floating_point() else x.sum(-1), False),
    "largest": (lambda x: x.abs().amax(0) if x.dtype != torch.bool else x.any(0), False),
}


def as_index(entry: Any) -> Any:
    """A drawn index as torch takes it."""
    if isinstance(entry, str):
        return Ellipsis
    if isinstance(entry, tuple) and entry and entry[0] in ("slice", "list", "tensor"):
        what, *rest = entry
        if what == "slice":
            return slice(*rest)
        if what == "list":
            return list(rest)
        return torch.tensor(rest)
    return tuple(as_index(e) for e in entry) if isinstance(entry, tuple) else entry


def selection(select: Select | None) -> Any:
    """What is passed as ``select=``."""
    if select is None:
        return None
    kind, what = select
    return as_index(what) if kind == "index" else FUNCTIONS[what][0]


def take(select: Select | None, x: Tensor) -> Tensor:
    chosen = selection(select)
    if chosen is None:
        return x
    return chosen(x) if callable(chosen) else x[chosen]


def put(select: Select | None, x: Tensor, new: Tensor) -> Tensor:
    """``x`` with the selected elements replaced, through the position of each: the oracle's own way."""
    if select is None:
        return new
    where = take(select, torch.arange(x.numel()).view(x.shape))
    return x.flatten().scatter(0, where.flatten(), new.flatten()).view(x.shape)


def can_write(select: Select | None, shape: tuple[int, ...]) -> bool:
    """Whether an edit of the selection has one meaning: it is a part of the value, and no element is in it twice."""
    if select is None:
        return True
    if select[0] == "function" and not FUNCTIONS[select[1]][1]:
        return False
    where = take(select, torch.arange(torch.Size(shape).numel()).view(shape)).flatten()
    return len(where.unique()) == len(where)
