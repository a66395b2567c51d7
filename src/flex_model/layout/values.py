"""Comparing values: within a rank by elements, across ranks by a small digest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

__all__ = ["ROW", "Digest", "close", "digest", "local", "mark", "prove_nothing", "rows", "same", "sharding"]

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


def rows(digests: Sequence[Digest]) -> Tensor:
    """Each digest as ``ROW`` numbers: what the tensor is, its margin, its samples, and where they are few the first of
    them again. Ranks whose rows differ by no more than the margin in any number hold equal tensors."""
    if not digests:
        return torch.zeros((0, ROW), dtype=torch.double, device="cpu")
    heads = [[_mark_of(d.shape, d.dtype), d.tolerance * d.scale] for d in digests]
    samples = torch.cat([s for d in digests for s in _filled(d.samples)]).view(-1, _SAMPLES)
    return torch.cat([torch.tensor(heads, dtype=torch.double, device="cpu"), samples], 1)


def _filled(samples: Tensor) -> tuple[Tensor, ...]:
    missing = _SAMPLES - len(samples)
    if not missing:
        return (samples,)
    return (samples, samples[:1].expand(missing)) if len(samples) else (samples.new_zeros(missing),)


def prove_nothing(rows: Tensor) -> Tensor:
    """Of which rows all samples are alike: a replica and a shard of zeros would look the same."""
    samples = rows[:, 2:]
    return samples.amax(1) == samples.amin(1)


def same(digests: Sequence[Digest]) -> bool:
    """Whether the tensors behind the digests are equal within their dtype's tolerance."""
    numbers = rows(digests)
    apart = numbers.amax(0) - numbers.amin(0)
    return bool(apart[0] == 0 and (apart[2:] <= numbers[:, 1].max()).all())


def mark(value: object) -> int:
    """A number that ranks share when ``value`` prints alike on them; exact as a float, too."""
    return int.from_bytes(blake2b(repr(value).encode(), digest_size=6).digest(), "big")


@lru_cache(maxsize=256)
def _mark_of(shape: tuple[int, ...], dtype: str) -> int:
    return mark((shape, dtype))


_kept_places: dict[tuple[int, int, torch.device], Tensor] = {}


def _places(elements: int, count: int, device: torch.device) -> Tensor:
    """``count`` indices evenly over so many elements."""
    places = _kept_places.get((elements, count, device))
    if places is None:
        places = torch.linspace(0, elements - 1, count, dtype=torch.double, device="cpu").long().to(device)
        if type(places) is Tensor and len(_kept_places) < 256:  # and nothing of a mode that is on
            _kept_places[elements, count, device] = places
    return places


def digest(tensor: Tensor) -> Digest:
    tensor = local(tensor)
    flat, elements = tensor.flatten(), tensor.numel()
    count = min(_SAMPLES // 2 if tensor.is_complex() else _SAMPLES, elements)  # complex elements are two numbers
    some = flat if count == elements else flat[_places(elements, count, flat.device)]
    samples = _comparable(some).flatten().cpu()
    return Digest(
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype),
        samples=samples,
        scale=float(samples.abs().max()) if elements else 0.0,
        tolerance=_tolerance(tensor.dtype),
    )
