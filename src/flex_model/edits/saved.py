"""Edits and hooks as JSON, with their tensors beside it in safetensors. Nothing is pickled.

A function of the user's own is kept by its import path; one that has none (a lambda, a function in a function) is
refused. Modules are kept as their import path, their ``config`` and their weights.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import EllipsisType
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from flex_model.edits.preset import FACTORIES, Preset
from flex_model.errors import EditError
from flex_model.layout.layout import ZigZag

__all__ = ["from_json", "to_json"]

_PLACEMENTS: dict[str, Callable[..., Placement]] = {k.__name__: k for k in (Shard, Replicate, Partial, ZigZag)}


def to_json(value: Any, tensors: dict[str, Tensor]) -> Any:
    """``value`` as what ``json.dump`` takes; its tensors go to ``tensors`` by name.

    >>> import torch
    >>> from flex_model import edits
    >>> tensors = {}
    >>> told = edits.to_json(edits.add(torch.ones(2), scale=3.0), tensors)
    >>> told["preset"], sorted(told["arguments"]), tensors["0"].tolist()
    ('add', ['normalize', 'positions', 'scale', 'vector', 'when'], [1.0, 1.0])
    >>> edits.from_json(told, tensors)
    edits.add(Tensor(2,), scale=3.0)
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Preset):
        return {"preset": value.kind, "arguments": {k: to_json(v, tensors) for k, v in value.arguments.items()}}
    if isinstance(value, DTensor):
        raise EditError(
            f"a shard of shape {tuple(value.shape)} cannot be saved; give the edit the whole value.", page="not-saved"
        )
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, (list, tuple)):
        return {"tuple" if isinstance(value, tuple) else "list": [to_json(v, tensors) for v in value]}
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if isinstance(value, Placement):
        return _of_placement(value)
    if isinstance(value, EllipsisType):
        return {"ellipsis": True}
    if isinstance(value, Mapping):
        return {"dict": {k: to_json(v, tensors) for k, v in value.items()}}
    if isinstance(value, nn.Module):
        return _of_module(value, tensors)
    if callable(value):
        return {"function": path_of(value)}
    raise EditError(
        f"{type(value).__name__} cannot be saved; numbers, strings, tensors, presets and functions that can be "
        f"imported can.",
        page="not-saved",
    )


def from_json(told: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What ``to_json`` was given."""
    if not isinstance(told, dict):
        return told
    kind, inner = next(iter(told.items()))
    if kind == "preset":
        if inner not in FACTORIES:
            raise EditError(
                f"there is no preset {inner!r}; known are {', '.join(sorted(FACTORIES))}.", page="not-saved"
            )
        return FACTORIES[inner](**{k: from_json(v, tensors) for k, v in told["arguments"].items()})
    if kind == "tensor":
        return tensors[inner]
    if kind in ("tuple", "list"):
        items = [from_json(v, tensors) for v in inner]
        return tuple(items) if kind == "tuple" else items
    if kind == "slice":
        return slice(*inner)
    if kind == "placement":
        return _PLACEMENTS[inner[0]](*inner[1:])
    if kind == "ellipsis":
        return ...
    if kind == "dict":
        return {k: from_json(v, tensors) for k, v in inner.items()}
    if kind == "function":
        return imported(inner)
    if kind == "module":
        return _module_again(told, tensors)
    raise EditError(f"{kind!r} is nothing that was saved here.", page="not-saved")


def path_of(function: Any) -> str:
    """``package.module:name`` of what can be imported from there."""
    where, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    path = f"{where}:{name}"
    try:
        found = imported(path)
    except EditError:
        found = None
    if found is not function or where == "__main__":
        raise EditError(
            f"{name or type(function).__name__} cannot be imported from {where}, so that it cannot be saved; "
            f"define it at the top of a module, or use a preset.",
            page="not-saved",
        )
    return path


def imported(path: str) -> Any:
    where, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(where)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise EditError(f"{path!r} cannot be imported: {error}.", page="not-saved") from error
    return found


def _of_placement(value: Placement) -> dict[str, Any]:
    name = type(value).__name__
    if name not in _PLACEMENTS:
        raise EditError(f"the placement {value} cannot be saved.", page="not-saved")
    given = [getattr(value, f) for f in ("dim", "reduce_op") if hasattr(value, f)]
    return {"placement": [name, *given]}


def _of_module(value: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    config = getattr(value, "config", None)
    if not isinstance(config, Mapping):
        raise EditError(
            f"{type(value).__name__} cannot be saved: it has no config, the keywords to make it with again; "
            f"set module.config = dict(...) first.",
            page="not-saved",
        )
    weights = {k: to_json(v, tensors) for k, v in value.state_dict().items()}
    return {"module": path_of(type(value)), "config": to_json(config, tensors), "weights": weights}


def _module_again(told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    made: Callable[..., nn.Module] = imported(told["module"])
    if not (isinstance(made, type) and issubclass(made, nn.Module)):  # it is about to be called
        raise EditError(f"{told['module']!r} is no module class.", page="not-saved")
    module = made(**from_json(told["config"], tensors))
    module.load_state_dict({k: from_json(v, tensors) for k, v in told["weights"].items()})
    return module
