"""How the sizes that a module keeps scale with the number of ranks, read from its source."""

from __future__ import annotations

import pytest
import torch
from fairscale.nn.model_parallel import initialize as fs_init
from fairscale.nn.model_parallel.initialize import get_model_parallel_world_size
from torch import nn

from flex_model.engines.own_sizes import Calls, Local, own_sizes, uses, whole_value

CALLS = Calls(
    sizes=frozenset({"get_model_parallel_world_size"}),
    ranks=frozenset({"get_model_parallel_rank"}),
    groups=frozenset({"get_model_parallel_group"}),
    moves=frozenset({"copy_to_model_parallel_region"}),
)


class Base(nn.Module):
    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.ranks = get_model_parallel_world_size()
        self.heads, self.local = heads, heads // self.ranks


class Many(Base):
    def __init__(self, heads: int, dim: int) -> None:
        super().__init__(heads, dim)
        ranks = fs_init.get_model_parallel_world_size()
        self.head = dim // heads
        self.width = self.local * self.head
        self.kv = int(heads / ranks)
        self.n_rep = self.local // self.kv
        self.whole_again = self.width * ranks
        self.place = fs_init.get_model_parallel_rank()
        self.first = self.place * self.local
        self.shape = (2, self.local, self.head)
        self.cache = torch.zeros(self.shape).to(torch.float64)
        self.register_buffer("table", torch.empty(self.local, self.head))
        self.plus_one = self.local + 1
        self.at_least = max(1, self.local)
        self.linear = nn.Linear(dim, self.width)
        self.blocks = nn.ModuleList()
        self.blocks.append(nn.Linear(dim, self.width))
        self.both = self.local if heads else heads
        for _ in range(2):
            self.halved = self.local // 2
        if not fs_init.model_parallel_is_initialized():
            self.halved = self.local
        self.halved //= 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


POWERS = {"ranks": -1, "local": 1, "width": 1, "kv": 1, "halved": 1}
UNKNOWN = {"plus_one", "at_least", "linear", "blocks", "both"}


def test_how_attributes_scale() -> None:
    module = Many.__new__(Many)
    found = own_sizes(module, CALLS)
    assert {n: local.power for n, local in found.items() if local.power} == POWERS
    assert {n for n, local in found.items() if local.problem} == UNKNOWN
    assert {n for n, local in found.items() if local.is_rank} == {"place", "first"}
    assert {n: local.dims for n, local in found.items() if local.dims} == {
        "shape": (0, 1, 0),
        "cache": (0, 1, 0),
        "table": (1, 0),
    }


def test_values() -> None:
    assert whole_value(3, Local(1), 4) == 12
    assert whole_value(4, Local(-1), 4) == 1
    assert whole_value(3, Local(is_rank=True), 4) == 0
    assert whole_value((2, 3), Local(dims=(0, 1)), 2) == (2, 6)
    assert whole_value(torch.ones(2, 3), Local(dims=(0, 1)), 2).shape == (2, 6)


@pytest.mark.parametrize(
    ("value", "local"),
    [(3, Local(problem="x")), (True, Local(1)), (None, Local(1)), (3, Local(-1)), (torch.ones(2), Local(dims=(0, 1)))],
)
def test_values_that_cannot_be_said(value: object, local: Local) -> None:
    with pytest.raises(ValueError):
        whole_value(value, local, 2)


def test_names_in_bytecode() -> None:
    assert uses(Many.__new__(Many), frozenset({"get_model_parallel_rank", "other"})) == {"get_model_parallel_rank"}
    assert not uses(nn.Linear(1, 1), CALLS.all)
    assert own_sizes(nn.Linear(1, 1), CALLS) == {}
