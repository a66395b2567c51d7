"""Context parallelism: the sequence in parts over ``cp``, in zig-zag or contiguous; values in true order, gradients
the oracle's (equal tokens a rank, so that the mean of the ranks' losses is the loss)."""

from __future__ import annotations

import context
import parity
import pytest
from torch.distributed.tensor import Shard
from worlds import run_world

from flex_model import ZigZag

ORDERS = {"zig-zag": ZigZag, "contiguous": Shard}
MESHES = [("cp",), ("dp", "cp"), ("cp", "tp")]


def _parity(names: tuple[str, ...], order: str) -> tuple[str, list[str], int]:
    plain = context.plain()
    placed = context.place(names, ORDERS[order], plain)
    inputs = context.full_inputs()
    mine = [placed.mine(x) for x in inputs]
    count = parity.compare(
        placed.model,
        plain,
        lambda m: m(*mine).pow(2).mean(),
        lambda m: m(*inputs).pow(2).mean(),
        mesh=placed.mesh,
    )
    return str(count), count.wrong + count.refused, count.tried


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("names", MESHES, ids=" x ".join)
def test_parity(names: tuple[str, ...], order: str) -> None:
    for text, problems, tried in run_world(2 ** len(names), _parity, names, order):
        print(f"{' x '.join(names)}, {order}: {text}")
        assert not problems and tried == 114
