"""Between what a module passes on and the local tensor behind it."""

from __future__ import annotations

from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

__all__ = ["like", "plain"]


def plain(value: Tensor) -> Tensor:
    """The local tensor behind ``value``, with its graph."""
    if isinstance(value, DTensor):
        value = value.to_local()
    if isinstance(value, AsyncCollectiveTensor):
        value = value.clone()
    return value


def like(local: Tensor, value: Tensor) -> Tensor:
    """``local`` in the form of ``value``: a DTensor again where it was one."""
    if not isinstance(value, DTensor):
        return local
    return DTensor.from_local(
        local, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
    )
