"""Comparing values: within a rank by elements, across ranks by a small digest."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

__all__ = ["ROW", "Digest", "close", "digest", "local", "mark", "same", "sharding"]

_SAMPLES = 256
ROW = 2 + _SAMPLES
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def sharding(tensor: Tensor) -> Any:
    """The DTensor spec of a tensor, also of a parameter that DDP has made local between forwards; None if plain."""
    return tensor._spec if isinstance(tensor, DTensor) else getattr(tensor, "_st_info", None)


def local(tensor: Tensor) -> Tensor:
    """The plain tensor this rank holds."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    if isinstance(tensor, AsyncCollectiveTensor):
        tensor = tensor.wait()
    return tensor.detach()


def _tolerance(dtype: torch.dtype) -> float:
    return _TOLERANCE.get(dtype, 0.1 if dtype.is_floating_point else 0.0)


def _comparable(tensor: Tensor) -> Tensor:
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return torch.nan_to_num(tensor.double(), nan=7.0, posinf=1e30, neginf=-1e30).clamp(-1e30, 1e30)


def close(a: Tensor, b: Tensor) -> bool:
    """Equal within what the dtype can resolve, relative to the largest element."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.numel() or torch.equal(a, b):
        return True
    x, y = _comparable(a), _comparable(b)
    return bool((x - y).abs().max() <= _tolerance(a.dtype) * x.abs().max())


@dataclass(frozen=True, slots=True, eq=False)
class Digest:
    """A few numbers that equal tensors share: evenly spaced elements and their scale."""

    shape: tuple[int, ...]
    dtype: str
    samples: Tensor  # float64, on the CPU
    scale: float
    tolerance: float

    @property
    def proves_nothing(self) -> bool:
        """All elements alike: a replica and a shard of zeros would look the same."""
        return not self.samples.numel() or bool((self.samples == self.samples[0]).all())

    def row(self) -> Tensor:
        """All of it as ``ROW`` numbers: what the tensor is, its margin, its samples. Ranks whose rows differ by no more
        than the margin in any number hold equal tensors."""
        out = torch.zeros(ROW, dtype=torch.double)
        out[0], out[1] = mark((self.shape, self.dtype)), self.tolerance * self.scale
        out[2 : 2 + len(self.samples)] = self.samples
        return out


def same(digests: list[Digest]) -> bool:
    """Whether the tensors behind the digests are equal within their dtype's tolerance."""
    rows = torch.stack([d.row() for d in digests])
    apart = rows.amax(0) - rows.amin(0)
    return bool(apart[0] == 0 and (apart[2:] <= rows[:, 1].max()).all())


def mark(value: object) -> int:
    """A number that ranks share when ``value`` prints alike on them; exact as a float, too."""
    return int.from_bytes(blake2b(repr(value).encode(), digest_size=6).digest(), "big")


def digest(tensor: Tensor) -> Digest:
    tensor = local(tensor)
    flat = tensor.flatten()
    count = min(_SAMPLES // 2 if tensor.is_complex() else _SAMPLES, flat.numel())  # complex elements are two numbers
    where = torch.linspace(0, max(flat.numel() - 1, 0), count, dtype=torch.double).long()
    samples = _comparable(flat[where.to(flat.device)]).flatten().cpu()
    return Digest(
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype),
        samples=samples,
        scale=float(samples.abs().max()) if flat.numel() else 0.0,
        tolerance=_tolerance(tensor.dtype),
    )
