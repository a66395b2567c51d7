"""Running code on shapes alone: floats are on the meta device, integers and bools keep their values.

Models branch on masks, positions and lengths, so those stay; torch's own fake tensors would give them up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from flex_model.layout.meta_results import Results, makes_new
from flex_model.layout.moves import Trace

__all__ = ["IntegersAreReal", "nonzero_is_full"]

aten = torch.ops.aten


def _to_meta(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="meta")


class IntegersAreReal(TorchDispatchMode):
    """Floats are meta, integers and bools are real; an op that mixes them is meta."""

    def __init__(self, trace: Trace | None) -> None:
        super().__init__()
        self._trace = trace
        self._results = Results()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in here, and torch's wrapper that says so takes as long as an operator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = _tensors_of(args, kwargs)
        result = self._run(func, args, kwargs, tensors)
        if self._trace is not None:
            self._trace.note(func, args, tensors, result)
        return result

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any] | None, tensors: list[Tensor]) -> Any:
        real = [t for t in tensors if not t.is_meta]
        on_meta = len(real) < len(tensors)
        instead, remembered = _how(func)
        if on_meta and instead is not None:
            return instead(*args, **(kwargs or {}))
        if func is aten.histc.default and not args[0].is_floating_point():
            args = (args[0].float(), *args[1:])
        if kwargs and kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": self._device(func, args, kwargs, tensors)}
        if on_meta and real:
            args, kwargs = pytree.tree_map_only(Tensor, _to_meta, (args, kwargs or {}))
            if kwargs.get("device") is not None:
                kwargs["device"] = torch.device("meta")
        if on_meta and remembered:
            return self._results.of(func, args, kwargs)
        return func(*args, **kwargs) if kwargs else func(*args)

    @staticmethod
    def _device(func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> torch.device:
        device = torch.device(kwargs["device"])
        if func is aten._to_copy.default:
            if args[0].is_meta:
                return torch.device("meta")
            floating = (kwargs.get("dtype") or args[0].dtype).is_floating_point
            return args[0].device if device.type == "meta" and not floating else device
        if device.type != "meta" or tensors:
            return device
        arange = func in (aten.arange.default, aten.arange.start, aten.arange.start_step)
        integral = arange and not any(isinstance(a, float) for a in args)
        dtype = kwargs.get("dtype") or (torch.long if integral else torch.get_default_dtype())
        return device if dtype.is_floating_point or dtype.is_complex else torch.device("cpu")


def _scalar(tensor: Tensor) -> object:
    return True if tensor.dtype == torch.bool else 1


def _tensors_of(args: Any, kwargs: dict[str, Any] | None) -> list[Tensor]:
    """The tensors an operator is given, by themselves or in lists; pytree would take longer than the operator."""
    out = []
    for given in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(given, Tensor):
            out.append(given)
        elif isinstance(given, (list, tuple)) and given and type(given[0]) is not int:  # a shape
            out += [t for t in given if isinstance(t, Tensor)]
    return out


def _unsent(func: Any, *args: Any, **_: Any) -> Any:
    """A collective into tensors that are there already has nothing to bring but its shapes."""
    from torch._C._distributed_c10d import FakeWork

    work = FakeWork().boxed()
    return work if len(func._schema.returns) == 1 else (args[0], work)


def _nonzero(tensor: Tensor) -> Tensor:  # the most there can be: everything
    return torch.empty((tensor.numel(), tensor.dim()), dtype=torch.long, device="meta")


def _grouped_mm(a: Tensor, b: Tensor, *_: Any, **__: Any) -> Tensor:  # the meta kernel takes bf16 only
    if a.dim() == 2 and b.dim() == 3:
        return torch.empty((a.shape[0], b.shape[-1]), dtype=a.dtype, device="meta")
    lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return torch.empty((*lead, a.shape[-2], b.shape[-1]), dtype=a.dtype, device="meta")


_SUBSTITUTES: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: _scalar,
    aten.nonzero.default: _nonzero,
    aten._grouped_mm.default: _grouped_mm,
}


@cache
def _how(func: Any) -> tuple[Callable[..., Any] | None, bool]:
    """What an operator is replaced by on meta tensors, and whether what it makes of them is remembered."""
    instead = partial(_unsent, func) if func.namespace == "c10d" else _SUBSTITUTES.get(func)
    return instead, makes_new(func)


@contextmanager
def nonzero_is_full() -> Iterator[None]:
    """``nonzero`` of a meta tensor finds everything, which is the most there can be."""
    from torch.fx.experimental import _config as config

    before = config.meta_nonzero_assume_all_nonzero
    config.meta_nonzero_assume_all_nonzero = True
    try:
        yield
    finally:
        with suppress(AttributeError):
            config.meta_nonzero_assume_all_nonzero = before
