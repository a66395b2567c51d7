"""Digests: equal tensors have equal rows, other tensors have others, whatever they are digested beside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flex_model.layout.values import ROW, digest, prove_nothing, rows, same

KINDS = [
    torch.linspace(-1, 1, 1000).view(10, 100),
    torch.linspace(-1, 1, 1000).view(100, 10),
    torch.linspace(-1, 1, 1000).view(10, 100).t(),
    torch.linspace(-1, 1, 12).view(3, 4),
    torch.linspace(-1, 1, 256),
    torch.tensor(3.0),
    torch.zeros(0, 4),
    torch.linspace(-1, 1, 1000).to(torch.bfloat16),
    torch.linspace(-1, 1, 1000).to(torch.double),
    torch.linspace(-1, 1, 1000).to(torch.complex64) * (1 + 2j),
    torch.arange(1000),
    torch.arange(7) % 2 == 0,
    torch.tensor([float("nan"), float("inf"), -float("inf"), 1e38]),
]


def test_rows_are_the_same_beside_others() -> None:
    together = rows([digest(t) for t in KINDS])
    assert together.shape == (len(KINDS), ROW)
    for i, t in enumerate(KINDS):
        assert torch.equal(together[i], rows([digest(t.clone())])[0])
    assert len({tuple(row.tolist()) for row in together}) == len(KINDS)
    assert rows([]).shape == (0, ROW)


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_same(kind: int) -> None:
    value = KINDS[kind]
    assert same([digest(value), digest(value.clone())])
    if value.numel():
        other = value.flatten().clone()
        other[0] = not value.flatten()[0] if value.dtype is torch.bool else -1e38 if value.isnan().any() else 7e5
        assert not same([digest(value), digest(other.view(value.shape))])


def test_close_is_the_same() -> None:
    value = torch.randn(30, 40)
    assert same([digest(value), digest(value * (1 + 1e-6))])
    assert not same([digest(value), digest(value * (1 + 1e-2))])


@pytest.mark.parametrize("size", [3, 256, 1000])
def test_a_digest_keeps_what_it_saw(size: int) -> None:
    value = torch.randn(size)
    before, copy = digest(value), value.clone()
    value.zero_()
    assert same([before, digest(copy)]) and not same([before, digest(value)])


@pytest.mark.parametrize(
    ("value", "nothing"),
    [
        (torch.zeros(4, 5), True),
        (torch.full((1000,), 3.0), True),
        (torch.tensor(2.0), True),
        (torch.zeros(0), True),
        (torch.tensor([0.0, 0.0, 1.0]), False),
        (torch.arange(2), False),
    ],
)
def test_what_proves_nothing(value: Tensor, nothing: bool) -> None:
    assert prove_nothing(rows([digest(KINDS[0]), digest(value)])).tolist() == [False, nothing]
