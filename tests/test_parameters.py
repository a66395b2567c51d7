"""Parameters: the full parameter, and its full gradient once a backward, read and edited, under every engine."""

from __future__ import annotations

import copy
from typing import Any

import engines
import models
import parity
import pytest
import torch
from oracle import relative_error
from torch import Tensor
from worlds import run_world

from flex_model import FlexModel, HookFunction

NAMES = [n for n, _ in models.net().named_parameters()]


def _full_parameters(engine: str) -> list[str]:
    plain = models.net()
    fm = FlexModel(engines.place(engine, copy.deepcopy(plain)).model)
    return [n for n, p in plain.named_parameters() if not torch.equal(fm.get_module_parameter(n), p.detach())]


def _gradients(engine: str, backwards: int) -> list[str]:
    plain = models.net()
    placed = engines.place(engine, copy.deepcopy(plain))
    full = models.tokens()
    want: dict[str, list[Tensor]] = {n: [] for n in NAMES}
    for name, parameter in plain.named_parameters():
        parameter.register_hook(lambda g, name=name: want[name].append(g.clone()))
    output: dict[str, list[Tensor]] = {}
    fm = FlexModel(placed.model, output, deliver="all")
    for name in NAMES:
        fm.register_hook(HookFunction(name))
    for step in range(backwards):
        batch = (full + step) % 32
        engines.loss(plain(batch)).backward()
        engines.local_loss(engine, fm(placed.mine(batch))).backward()
    bad = []
    for name in NAMES:
        if len(output.get(name, [])) != backwards:
            bad.append(f"{name}: fired {len(output.get(name, []))} times")
            continue
        error = max(relative_error(g, w) for g, w in zip(output[name], want[name], strict=True))
        if error > 1e-5:
            bad.append(f"{name}: off by {error:.2g}")
    return bad


def _edited(engine: str) -> list[str]:
    def edit(g: Tensor) -> Tensor:
        return 2 * g + g.mean(0, keepdim=True)

    plain = models.net()
    placed = engines.place(engine, copy.deepcopy(plain))
    full = models.tokens()
    fm = FlexModel(placed.model)
    for name, parameter in plain.named_parameters():
        parameter.register_hook(edit)
        fm.register_hook(HookFunction(name, editing_function=edit, capture=False))
    parameters: dict[str, Any] = dict(fm.named_parameters())
    engines.loss(plain(full)).backward()
    engines.local_loss(engine, fm(placed.mine(full))).backward()
    return parity.wrong_gradients(fm, plain, parameters)


ENGINES = [(2, e) for e in engines.TWO_RANKS] + [(4, e) for e in engines.FOUR_RANKS]


@pytest.mark.parametrize(("ranks", "engine"), ENGINES)
def test_full_parameter(ranks: int, engine: str) -> None:
    assert run_world(ranks, _full_parameters, engine) == [[]] * ranks


@pytest.mark.parametrize(("ranks", "engine"), ENGINES)
@pytest.mark.parametrize("backwards", [1, 3])
def test_gradient(ranks: int, engine: str, backwards: int) -> None:
    assert run_world(ranks, _gradients, engine, backwards) == [[]] * ranks


@pytest.mark.parametrize(("ranks", "engine"), ENGINES)
def test_edited_gradient(ranks: int, engine: str) -> None:
    assert run_world(ranks, _edited, engine) == [[]] * ranks
