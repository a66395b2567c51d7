"""Process groups that nobody else is in on, for code that must run as if it were on some rank of some group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup
from torch.distributed import distributed_c10d

__all__ = ["known", "silent_group"]


def silent_group(rank: int = 0, size: int = 1) -> Any:
    """A group whose collectives do nothing. Nobody else takes part in making it, unlike ``dist.new_group``."""
    return FakeProcessGroup._create_internal(rank, size)


@contextmanager
def known(group: Any) -> Iterator[None]:
    """torch tells this rank's place in ``group`` for the time of the block."""
    registered: dict[Any, dict[int, int]] = distributed_c10d._world.pg_group_ranks
    registered[group] = {dist.get_rank(): group.rank()}
    try:
        yield
    finally:
        del registered[group]
