"""Tensors of an edit's own beside the value: on its device, in its dtype, and as a DTensor where it is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from flex_model.errors import EditError

__all__ = ["Held", "beside", "like", "per_token"]


class Held(Protocol):
    """A value that is looked up when the edit runs."""

    def value(self) -> Any: ...


def like(tensor: Tensor, x: Tensor) -> Tensor:
    """``tensor``, which every rank has whole, as something ``x`` can be combined with."""
    if not isinstance(x, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return DTensor.from_local(tensor, x.device_mesh, [Replicate()] * x.device_mesh.ndim, run_check=False)


def beside(value: Tensor | Held, x: Tensor) -> Tensor:
    """A tensor given to an edit, cast to the value's device and dtype; a shard stays one beside a shard."""
    tensor = value if isinstance(value, Tensor) else value.value()
    if not isinstance(tensor, Tensor):
        raise EditError(
            f"an edit was given {type(tensor).__name__}, whose parts make no tensor; give it a whole value.",
            page="preset-arguments",
        )
    if isinstance(tensor, DTensor) and not isinstance(x, DTensor):
        tensor = tensor.full_tensor()
    if isinstance(tensor, DTensor) and isinstance(x, DTensor):
        local = tensor.to_local().to(device=x.device, dtype=x.dtype)
        tensor = DTensor.from_local(
            local, x.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
        return tensor
    return like(tensor.to(device=x.device, dtype=x.dtype), x)


def per_token(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``fn``, which works on the last dim alone, on the tokens that each rank has; only a sharded last dim moves."""
    if not isinstance(x, DTensor):
        return fn(x)
    last = x.dim() - 1
    whole: list[Any] = [Replicate() if p.is_partial() or p.is_shard(last) else p for p in x.placements]
    value = x if list(x.placements) == whole else x.redistribute(placements=whole)
    out = fn(value.to_local())
    new = DTensor.from_local(out, x.device_mesh, whole, run_check=False, shape=x.shape, stride=x.stride())
    return new if list(x.placements) == whole else new.redistribute(placements=x.placements)
