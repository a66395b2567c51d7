"""``hooks_on``: some hooks for the length of a block of code, as ``capture``, ``edit`` and a harvest have them; and
``evaluating``: a block of code in which the model only shows what it does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flex_model.components.place import Spot
from flex_model.core.bound import Bound
from flex_model.core.sums import watched_sums
from flex_model.core.unfired.missed import Block

if TYPE_CHECKING:
    from flex_model.core.runtime import Runtime

__all__ = ["evaluating", "hooks_on"]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards what was training is again."""
    training = [m for m in module.modules() if m.training]
    for one in training:
        one.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for one in training:
            one.training = True


@contextmanager
def hooks_on(
    runtime: Runtime,
    bounds: Sequence[Bound],
    spots: Sequence[Spot],
    refused: dict[Any, Exception],
    *,
    stop: bool = False,
    deliver: bool = True,
    tell: bool = True,
) -> Iterator[Block]:
    """``refused`` takes the errors of ``spots`` where the sums of the residual stream do not hold. ``deliver``: what
    was captured has arrived when the block is left, which is then collective. ``tell``: warn of what did not fire."""
    block = Block(runtime.missed, bounds)
    runtime.bounds += bounds
    runtime.installed.put_on()
    try:
        with runtime.watch.telling(), watched_sums(runtime, spots, refused):
            with runtime.stopping.block(stop):
                yield block
            if deliver:
                runtime.outbox.flush()
        if tell:
            block.end()
    finally:
        runtime.bounds = [b for b in runtime.bounds if b not in bounds]
        runtime.outbox.discard(list(bounds))
        runtime.installed.put_on()
