"""``nowhere``: one rank of ranks that need not exist, and models without numbers that run there.

torch's ``fake`` process group answers for the others, and floating tensors are on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from flex_model.errors import FlexModelError
from flex_model.layout.meta_mode import IntegersAreReal

__all__ = ["nowhere"]


class _OnMeta(IntegersAreReal):
    """What a DTensor is to others, its shards are here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it asks for its shards' operators, which come here
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def nowhere(ranks: int, *, rank: int = 0) -> Iterator[torch.utils._python_dispatch.TorchDispatchMode]:
    """A world of ``ranks`` of which this process is one; models on the meta device run in the mode that is yielded.

    For a process that ends after it: torch keeps the meshes of a world that is gone, and finds their groups later.
    """
    if dist.is_initialized():
        raise FlexModelError(
            "this process has ranks beside it already; draw the model in a process of its own.", page="bad-argument"
        )
    if ranks > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield _OnMeta(None)
    finally:
        if ranks > 1:
            dist.destroy_process_group()
