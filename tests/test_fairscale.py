"""fairscale's layers: every named module of a net and of a LLaMA, values and gradients equal the oracle's."""

from __future__ import annotations

import copy

import engines
import fairscale_models
import models
import parity
import pytest
from worlds import run_world


def _net(engine: str) -> tuple[str, list[str], int]:
    plain = models.net()
    placed = engines.place(engine, copy.deepcopy(plain))
    full = models.tokens()
    count = parity.compare(
        placed.model,
        plain,
        lambda m: engines.local_loss(engine, m(placed.mine(full))),
        lambda m: engines.loss(m(full)),
    )
    return str(count), count.wrong + count.refused, count.tried


@pytest.mark.parametrize("engine", engines.FAIRSCALE_TWO_RANKS)
def test_net(engine: str) -> None:
    for text, problems, tried in run_world(2, _net, engine):
        print(f"{engine}: {text}")
        assert not problems and tried == 62


@pytest.mark.parametrize("engine", engines.FAIRSCALE_FOUR_RANKS)
def test_net_with_ddp(engine: str) -> None:
    for text, problems, tried in run_world(4, _net, engine):
        print(f"{engine}: {text}")
        assert not problems and tried == 62


def _llama(ddp: bool) -> tuple[str, list[str], int]:
    model, plain = fairscale_models.llama()
    full = models.tokens()
    model = fairscale_models.with_ddp(model) if ddp else model
    mine = fairscale_models.batch_part(full)
    count = parity.compare(model, plain, lambda m: engines.loss(m(mine)), lambda m: engines.loss(m(full)))
    return str(count), count.wrong + count.refused, count.tried


@pytest.mark.parametrize(("ranks", "ddp"), [(2, False), (4, False), (4, True)])
def test_llama(ranks: int, ddp: bool) -> None:
    for text, problems, tried in run_world(ranks, _llama, ddp):
        print(f"fairscale LLaMA on {ranks} ranks{', DDP' * ddp}: {text}")
        assert not problems and tried == 134
