"""A process group of this rank alone, for code that must run as if there were no other ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup
from torch.distributed import distributed_c10d

__all__ = ["known", "solo_group"]


def solo_group() -> Any:
    """A group of one, whose collectives do nothing. Nobody else takes part in making it, unlike ``dist.new_group``."""
    return FakeProcessGroup._create_internal(0, 1)


@contextmanager
def known(group: Any) -> Iterator[None]:
    """torch tells the rank in ``group`` for the time of the block."""
    registered: dict[Any, dict[int, int]] = distributed_c10d._world.pg_group_ranks
    registered[group] = {dist.get_rank(): 0}
    try:
        yield
    finally:
        del registered[group]
