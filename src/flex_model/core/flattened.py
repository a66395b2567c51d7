"""Values whose dim 0 is two dims in one: they move with the two apart, and the user has them as the model does.

Rows of ``[s, b, h]`` flattened to ``[s * b, h]`` are interleaved over data ranks, in as many blocks as the sequence is
long. Apart, they are plain shards of one dim each, whatever the lengths.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["check", "finish"]


def finish(then: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor]:
    """What is done to a whole value, or to each part of one without: flatten, then a selection if there is one."""
    return lambda full: full.flatten(0, 1) if then is None else then(full.flatten(0, 1))


def check(of: Callable[[tuple[int, ...]], str] | None) -> Callable[[tuple[int, ...]], str] | None:
    """A check of the flattened shape."""
    return None if of is None else lambda shape: of((shape[0] * shape[1], *shape[2:]))
