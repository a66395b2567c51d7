"""``Payload``: what one rank puts into operations of torch.distributed."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Payload"]


class Payload(TorchDispatchMode):
    """Operations of torch.distributed on this rank, and the bytes that it puts into them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2].rstrip("_")
        if func.namespace in ("c10d", "_c10d_functional") and name != "wait_tensor":
            names = [a.name for a in func._schema.arguments]
            given = [value for at, value in zip(names, args, strict=False) if not at.startswith("out")]
            self.calls[name] += 1
            self.bytes[name] += sum(t.nbytes for value in given for t in _tensors(value))
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, list | tuple):
        return [t for one in value for t in _tensors(one)]
    return [value] if isinstance(value, Tensor) else []
