"""Comparing values: within a rank by elements, across ranks by a small digest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

__all__ = ["ROW", "Digest", "close", "digest", "interned", "local", "mark", "prove_nothing", "rows", "same", "sharding"]

T = TypeVar("T")
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
    """A few numbers that equal tensors share: evenly spaced elements, on the CPU."""

    shape: tuple[int, ...]
    samples: Tensor


def digest(tensor: Tensor) -> Digest:
    tensor = local(tensor)
    flat, elements = tensor.flatten(), tensor.numel()
    count = min(_SAMPLES // 2 if tensor.is_complex() else _SAMPLES, elements)  # complex elements are two numbers
    some = flat.clone() if count == elements else flat[_places(elements, count, flat.device)]
    return Digest(interned(tuple(tensor.shape)), some.cpu())


@lru_cache(maxsize=1024)
def interned(shape: tuple[T, ...]) -> tuple[T, ...]:
    """The same object for all equal ones: a model has few shapes at many sites."""
    return shape


_kept_places: dict[tuple[int, int, torch.device], Tensor] = {}


def _places(elements: int, count: int, device: torch.device) -> Tensor:
    """``count`` indices evenly over so many elements."""
    places = _kept_places.get((elements, count, device))
    if places is None:
        places = torch.linspace(0, elements - 1, count, dtype=torch.double, device="cpu").long().to(device)
        if type(places) is Tensor and len(_kept_places) < 256:  # and nothing of a mode that is on
            _kept_places[elements, count, device] = places
    return places


def rows(digests: Sequence[Digest]) -> Tensor:
    """Each digest as ``ROW`` numbers: what the tensor is, its margin, its samples, and where they are few the first of
    them again. Ranks whose rows differ by no more than the margin in any number hold equal tensors."""
    out = torch.zeros((len(digests), ROW), dtype=torch.double, device="cpu")
    alike = defaultdict(list)
    for i, d in enumerate(digests):
        alike[d.samples.dtype, len(d.samples)].append(i)
    for (dtype, count), places in alike.items():
        here = [digests[i] for i in places]
        numbers = _comparable(torch.stack([d.samples for d in here])).flatten(1)
        out[places, 0] = torch.tensor([_mark_of(d.shape, str(dtype)) for d in here], dtype=torch.double, device="cpu")
        if count:
            out[places, 1] = numbers.abs().amax(1) * _tolerance(dtype)
            out[places, 2:] = torch.cat([numbers, numbers[:, :1].expand(-1, _SAMPLES - numbers.shape[1])], 1)
    return out


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
