"""Every named module of a plain torch model under every torch engine: values and gradients equal the oracle's."""

from __future__ import annotations

import copy

import engines
import models
import parity
import pytest
from worlds import run_world


def parity_of(engine: str, deliver: str = "all") -> tuple[str, list[str], int]:
    plain = models.net().to(engines.device)
    placed = engines.place(engine, copy.deepcopy(plain))
    full = models.tokens().to(engines.device)
    count = parity.compare(
        placed.model,
        plain,
        lambda m: engines.local_loss(engine, m(placed.mine(full))),
        lambda m: engines.loss(m(full)),
        deliver=deliver,
    )
    return str(count), count.wrong + count.refused, count.tried


@pytest.mark.parametrize("engine", engines.TWO_RANKS)
def test_two_ranks(engine: str) -> None:
    for text, problems, tried in run_world(2, parity_of, engine):
        print(f"{engine}: {text}")
        assert not problems and tried == 62


@pytest.mark.parametrize("engine", engines.FOUR_RANKS)
def test_four_ranks(engine: str) -> None:
    for text, problems, tried in run_world(4, parity_of, engine):
        print(f"{engine}: {text}")
        assert not problems and tried == 62


def _uneven() -> tuple[str, list[str], int]:
    plain = models.net(hidden=15)
    placed = engines.place("tp_dtensors", copy.deepcopy(plain))
    full = models.tokens()
    count = parity.compare(placed.model, plain, lambda m: engines.loss(m(full)), lambda m: engines.loss(m(full)))
    return str(count), count.wrong + count.refused, count.tried


def test_uneven_shards() -> None:
    for text, problems, tried in run_world(2, _uneven):
        print(f"uneven: {text}")
        assert not problems and tried == 62


def test_main_alone_receives() -> None:
    first, second = run_world(2, parity_of, "tp", "main")
    assert not first[1]
    assert len(second[1]) == second[2] and all("sent it to rank 0" in p for p in second[1])
