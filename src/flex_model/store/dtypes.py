"""Dtypes by name, in torch, in numpy and on disk; and rows as bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flex_model.errors import StoreError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["DTYPES", "as_torch", "dtype_name", "numpy_dtype", "row_bytes", "torch_dtype"]

_PLAIN = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")
_ADDED = ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")  # by ml_dtypes
DTYPES = (*_PLAIN, *_ADDED)


def dtype_name(dtype: Any) -> str:
    """Of a torch dtype, a numpy dtype or a name: the name.

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise StoreError(f"dtype {name!r} cannot be stored; expected one of {', '.join(DTYPES)}.", page="bad-argument")
    return name


def torch_dtype(dtype: Any) -> torch.dtype:
    """Of a torch dtype or a name."""
    found: torch.dtype = getattr(torch, dtype_name(dtype))
    return found


def numpy_dtype(name: str) -> np.dtype[Any]:
    """numpy's own, or the one that ml_dtypes adds to numpy; little-endian, as torch's on all machines it runs on."""
    import numpy as np

    if name in _PLAIN:
        return np.dtype(name)
    import ml_dtypes

    found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return found


def as_torch(rows: NDArray[Any], name: str) -> Tensor:
    """The same memory as a tensor; torch does not know numpy's added dtypes."""
    import numpy as np

    if name in _PLAIN:
        return torch.from_numpy(rows)
    carrier = np.uint16 if rows.dtype.itemsize == 2 else np.uint8
    return torch.from_numpy(rows.view(carrier)).view(getattr(torch, name))


def row_bytes(rows: Any, *, dtype: str, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """``(rows, ...)`` in host memory as bytes ``(rows, columns * itemsize)``: copied into ``out`` (flat, of as many
    bytes), or without it the same memory where it is that already."""
    import numpy as np

    kind, count = numpy_dtype(dtype), len(rows)
    if out is not None:
        there = out.view(kind).reshape(tuple(rows.shape))
        if isinstance(rows, Tensor):
            as_torch(there, dtype).copy_(rows.detach())
        else:
            np.copyto(there, rows)
        return out.reshape(count, -1)
    if isinstance(rows, Tensor):
        return rows.detach().cpu().contiguous().view(count, -1).view(torch.uint8).numpy()
    return np.ascontiguousarray(rows).reshape(count, -1).view(np.uint8)
