"""Waiting for other ranks: what a work says while it is not done is no failure."""

from __future__ import annotations

from typing import Any

import pytest
import torch

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
    wait(work, torch.ones(1))
    assert work.late == 0


def test_a_failure_is_raised() -> None:
    with pytest.raises(RuntimeError, match="closed by peer"):
        wait(Work(2, broken=True), torch.ones(1))
