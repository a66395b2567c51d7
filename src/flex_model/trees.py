"""Values are trees of tensors. This file finds the tensors in any of them and puts others in their place.

torch's own pytree does the walking (tuples, lists, dicts, named tuples, transformers' outputs); adapters open what it
takes for a leaf: dataclasses and key/value caches.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = [
    "Leaf",
    "as_call",
    "copy_tree",
    "find_leaves",
    "first_tensor",
    "input_leaves",
    "replace_leaves",
    "resolve_index",
    "tensors",
]

UnpackIdx = int | str | tuple[int | str, ...] | list[int | str]


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor of a value: its position in flattening order and its path (``hidden_states``, ``1.keys``)."""

    index: int
    path: str
    tensor: Tensor


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` of inputs that are given as one object: a dict is keywords, a tuple or list arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


def _key(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def _open_leaf(leaf: Any) -> dict[str, Any] | None:
    """The tensors' holders inside what pytree takes for a leaf, by name; None where there is nothing to open."""
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        return {f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf)}
    layers = getattr(leaf, "layers", None)  # transformers' Cache: one holder of keys and values a layer
    if isinstance(layers, list) and layers and hasattr(layers[0], "keys") and hasattr(layers[0], "values"):
        return {str(i): {"keys": layer.keys, "values": layer.values} for i, layer in enumerate(layers)}
    return None


def _close_leaf(leaf: Any, fields: dict[str, Any]) -> Any:
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        new = copy.copy(leaf)
        for name, value in fields.items():
            object.__setattr__(new, name, value)
        return new
    for i, layer in enumerate(leaf.layers):  # a cache is state: it is written in place
        layer.keys, layer.values = fields[str(i)]["keys"], fields[str(i)]["values"]
    return leaf


def _walk(value: Any, path: str, visit: Callable[[str, Tensor], Any]) -> Any:
    """``value`` with every tensor replaced by ``visit(path, tensor)``; untouched objects where nothing changed."""
    if isinstance(value, Tensor):
        return visit(path, value)
    pairs, spec = pytree.tree_flatten_with_path(value)
    new, changed = [], False
    for keys, leaf in pairs:
        where = ".".join([path] * bool(path) + [_key(k) for k in keys])
        if isinstance(leaf, Tensor):
            out = visit(where, leaf)
        elif (fields := _open_leaf(leaf)) is not None:
            opened = _walk(fields, where, visit)
            out = leaf if opened is fields else _close_leaf(leaf, opened)
        else:
            out = leaf
        changed |= out is not leaf
        new.append(out)
    return pytree.tree_unflatten(new, spec) if changed else value


def find_leaves(value: Any) -> list[Leaf]:
    """All tensors of ``value`` in flattening order.

    >>> [(l.index, l.path) for l in find_leaves({"a": torch.ones(1), "b": (None, torch.ones(2))})]
    [(0, 'a'), (1, 'b.1')]
    """
    found: list[Leaf] = []

    def visit(path: str, tensor: Tensor) -> Tensor:
        found.append(Leaf(len(found), path, tensor))
        return tensor

    _walk(value, "", visit)
    return found


def replace_leaves(value: Any, new: dict[int, Tensor]) -> Any:
    """``value`` with the tensors at the given positions replaced; everything else is the same object."""
    count = -1

    def visit(_: str, tensor: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return new.get(count, tensor)

    return _walk(value, "", visit)


def tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [leaf.tensor for leaf in find_leaves(value)]


def first_tensor(value: Any) -> Tensor | None:
    return next(iter(tensors(value)), None)


def input_leaves(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Leaf]:
    """Tensors of a module's inputs, arguments first; paths are argument names where the signature gives them."""
    found = find_leaves(args)
    names = _positional_names(module, len(args))
    named = []
    for leaf in found:
        head, _, rest = leaf.path.partition(".")
        path = ".".join([names[int(head)]] + [rest] * bool(rest))
        named.append(Leaf(leaf.index, path, leaf.tensor))
    extra = find_leaves(kwargs)
    return named + [Leaf(len(named) + leaf.index, leaf.path, leaf.tensor) for leaf in extra]


def _positional_names(module: nn.Module, count: int) -> list[str]:
    try:
        known = [
            p.name
            for p in inspect.signature(module.forward).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):
        known = []
    return known[:count] + [str(i) for i in range(len(known[:count]), count)]


def resolve_index(leaves: list[Leaf], unpack_idx: UnpackIdx) -> list[Leaf]:
    """The leaves that ``unpack_idx`` names: a number, a path, several of them, or ``"all"``; [] if there is none."""
    if unpack_idx == "all":
        return leaves
    if isinstance(unpack_idx, int):
        return [leaves[unpack_idx]] if -len(leaves) <= unpack_idx < len(leaves) else []
    if isinstance(unpack_idx, str):
        return [x for x in leaves if x.path == unpack_idx or x.path.startswith(unpack_idx + ".")]
    return [leaf for one in unpack_idx for leaf in resolve_index(leaves, one)]


class _DeepCopyTensors(TorchFunctionMode):
    """While active, ``copy.deepcopy`` calls ``fn`` on each tensor it meets, inside any Python object."""

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            with torch._C.DisableTorchFunction():
                return self.fn(args[0])
        return func(*args, **(kwargs or {}))


def copy_tree(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """A deep copy of any Python value with ``fn`` applied to its tensors, those inside caches and objects included.

    What cannot be copied (a module, a process group, an open file) is shared.
    """

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return fn(leaf)
        if isinstance(leaf, nn.Module):
            return leaf
        try:
            with _DeepCopyTensors(fn):
                return copy.deepcopy(leaf)
        except (TypeError, RuntimeError, AttributeError):
            return leaf

    return pytree.tree_map(one, value)
