"""Ready-made editing functions. Each returns a function of the full tensor, to be passed to ``fm.edit``.

>>> import torch
>>> add(torch.tensor([1.0, 2.0]), scale=2.0)(torch.zeros(1, 2)).tolist()
[[2.0, 4.0]]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

__all__ = ["add", "scale", "zero"]

Edit = Callable[[Tensor], Tensor]


def _like(tensor: Tensor, x: Tensor) -> Tensor:
    """``tensor`` as something ``x`` can be combined with: replicated where ``x`` is a DTensor."""
    if not isinstance(x, DTensor):
        return tensor
    return DTensor.from_local(tensor, x.device_mesh, [Replicate()] * x.device_mesh.ndim, run_check=False)


def add(vector: Tensor, *, scale: float = 1.0) -> Edit:
    """Add ``scale * vector`` to the value (steering). ``vector`` broadcasts against it; dtype and device follow it."""

    def edit(x: Tensor) -> Tensor:
        return x + _like(scale * vector.to(device=x.device, dtype=x.dtype), x)

    return edit


def scale(factor: float) -> Edit:
    """Multiply the value by ``factor``."""

    def edit(x: Tensor) -> Tensor:
        return x * factor

    return edit


def zero(index: Sequence[int] | None = None, *, dim: int = -1) -> Edit:
    """Set the value to zero: all of it, or the given positions of ``dim`` (units, or heads where they have a dim)."""

    def edit(x: Tensor) -> Tensor:
        if index is None:
            return torch.zeros_like(x)
        size = [1] * x.dim()
        size[dim] = x.shape[dim]
        keep = torch.ones(x.shape[dim], dtype=x.dtype, device=x.device)
        keep[list(index)] = 0
        return x * _like(keep.view(size), x)

    return edit
