"""Waiting for other ranks, and what telling them costs where nothing fails."""

from __future__ import annotations

import logging
import time
from typing import Any

import engines
import models
import pytest
import torch.distributed as dist
from worlds import run_world

from flex_model import FlexModel
from flex_model.core.agreeing import status
from flex_model.routing import watch
from flex_model.routing.watch import wait


class Work:
    """Times out ``late`` times; ``broken``: then it fails."""

    def __init__(self, late: int, *, done_at_once: bool = False, broken: bool = False) -> None:
        self.late, self.done_at_once, self.broken = late, done_at_once, broken

    def wait(self, *_: Any) -> None:
        if self.late:
            self.late -= 1
            raise RuntimeError("Operation timed out!")
        if self.broken:
            raise RuntimeError("Connection closed by peer")

    def is_completed(self) -> bool:
        return self.done_at_once or not self.late


@pytest.mark.parametrize("done_at_once", [False, True])  # it may end between the two questions
def test_a_wait_that_ran_out_is_made_again(done_at_once: bool) -> None:
    work = Work(1 if done_at_once else 3, done_at_once=done_at_once)
    wait(work)
    assert work.late == 0


def test_a_failure_is_raised() -> None:
    with pytest.raises(RuntimeError, match="closed by peer"):
        wait(Work(2, broken=True))


def _late() -> list[str]:
    """Rank 1 comes to the end of the forward 1.5 s late."""
    watch._LONG = 0.3
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    watch.logger.addHandler(handler)
    model = models.net()
    fm = FlexModel(engines.place("ddp", model).model)
    with fm.capture("head"):
        fm(models.tokens().chunk(2)[dist.get_rank()])
    if dist.get_rank() == 1:
        model.head.register_forward_hook(lambda *_: time.sleep(1.5))
    with fm.capture("head"):
        fm(models.tokens().chunk(2)[dist.get_rank()])
    return told


def test_a_long_wait_is_logged_with_who_is_missing() -> None:
    first, second = run_world(2, _late)
    assert len(first) == 1 and not second
    assert "rank 0 has waited" in first[0] and "rank 1 is alive but has not come" in first[0]


def _exchanges(engine: str) -> list[int]:
    """Exchanges of a forward whose hooks are known: with a replicated capture, a sharded one, and an edit of shards."""
    fm = FlexModel(engines.place(engine, models.net()).model)
    ids = models.tokens() if engine == "tp" else models.tokens().chunk(2)[dist.get_rank()]
    count, original = [0], status.extremes

    def counted(*args: Any) -> Any:
        count[0] += 1
        return original(*args)

    status.extremes = counted  # type: ignore[assignment]
    found = []
    for block in (
        lambda: fm.capture("layers.1"),
        lambda: fm.capture("layers.1.mlp.act"),
        lambda: fm.edit("layers.1.mlp.act", lambda x: x - x.mean(-1, keepdim=True)),
    ):
        with block():
            fm(ids)
            count[0] = 0
            fm(ids)
            found.append(count[0])
            count[0] = 0
        found.append(count[0])
    return found


@pytest.mark.parametrize(("engine", "forwards"), [("tp", [0, 1, 1]), ("ddp", [1, 1, 1])])
def test_one_exchange_a_forward_and_one_a_block(engine: str, forwards: list[int]) -> None:
    captured, sharded, edited = forwards
    assert run_world(2, _exchanges, engine) == [[captured, 1, sharded, 1, edited, 0]] * 2
