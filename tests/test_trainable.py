"""Trainable modules: their gradients are the oracle's on every rank, however they are used, accumulated and clipped."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import engines
import models
import pytest
import torch
from oracle import relative_error
from torch import Tensor, nn
from worlds import run_world

from flex_model import FlexModel, HookFunction

SITE = "layers.0.mlp.act"


def probe(width: int = 16) -> nn.Linear:
    torch.manual_seed(5)
    return nn.Linear(width, width)


def use(module: nn.Module, x: Tensor, save_ctx: object, modules: nn.ModuleDict) -> Tensor:
    return torch.tanh(modules["probe"](x))


def setup(engine: str, **keywords: Any) -> tuple[engines.Placed, FlexModel]:
    placed = engines.place(engine, models.net())
    fm = FlexModel(placed.model)
    fm.register_trainable_module("probe", probe())
    fm.register_forward_hook(HookFunction(SITE, editing_function=use, capture=False, **keywords))
    return placed, fm


def plain_setup() -> tuple[nn.Module, nn.Linear]:
    model, linear = models.net(), probe()
    model.get_submodule(SITE).register_forward_hook(lambda m, a, o: torch.tanh(linear(o)))
    return model, linear


def compare(fm: FlexModel, linear: nn.Linear) -> list[str]:
    bad = []
    for (name, p), q in zip(fm.trainable_modules.named_parameters(), linear.parameters(), strict=True):
        error = relative_error(engines.whole(p.grad), q.grad)
        if error > 1e-5:
            bad.append(f"{name} off by {error:.2g}")
    return bad


def _axes(engine: str, axes: tuple[str, ...]) -> list[str]:
    """Each data rank edits its own batch: the edit is the same function of each row, so that the oracle is the same."""
    placed, fm = setup(engine, axes=axes)
    model, linear = plain_setup()
    full = models.tokens()
    engines.loss(model(full)).backward()
    engines.local_loss(engine, fm(placed.mine(full))).backward()
    return compare(fm, linear)


@pytest.mark.parametrize(
    ("ranks", "engine", "axes"),
    [
        (2, "ddp", ("tp",)),
        (2, "ddp", ()),
        (2, "fsdp2", ()),
        (2, "tp", ("tp",)),
        (4, "2d_tp", ("tp",)),
        (4, "hsdp", ("dp_replicate",)),
    ],
)
def test_axes(ranks: int, engine: str, axes: tuple[str, ...]) -> None:
    assert run_world(ranks, _axes, engine, axes) == [[]] * ranks


def _accumulated(engine: str, no_sync: bool) -> list[str]:
    placed, fm = setup(engine)
    model, linear = plain_setup()
    full = models.tokens()
    for step in range(3):
        batch = (full + step) % 32
        engines.loss(model(batch)).backward()
        quiet: Any = nullcontext()
        if no_sync and step < 2:
            quiet = placed.model.no_sync() if hasattr(placed.model, "no_sync") else quiet
            if engine == "fsdp2":
                placed.model.set_requires_gradient_sync(False)  # type: ignore[operator]
        elif engine == "fsdp2":
            placed.model.set_requires_gradient_sync(True)  # type: ignore[operator]
        with quiet:
            engines.local_loss(engine, fm(placed.mine(batch))).backward()
    return compare(fm, linear)


@pytest.mark.parametrize(
    ("engine", "no_sync"),
    [
        ("ddp", False),
        ("ddp", True),
        ("fsdp1", False),
        ("fsdp1", True),
        ("fsdp2", False),
        ("fsdp2", True),
        ("tp", False),
    ],
)
def test_accumulation(engine: str, no_sync: bool) -> None:
    assert run_world(2, _accumulated, engine, no_sync) == [[]] * 2


def test_an_engine_on_one_rank() -> None:
    """Nothing is sharded, and parameters are DTensors all the same."""
    assert run_world(1, _accumulated, "fsdp2", False) == [[]]


def _trained(engine: str, fused: bool) -> list[str]:
    placed, fm = setup(engine)
    model, linear = plain_setup()
    full = models.tokens()
    kind = {"fused": True} if fused else {"foreach": True}
    mine = torch.optim.AdamW(fm.parameters(), lr=1e-2, eps=1e-4, **kind)  # type: ignore[arg-type]
    theirs = torch.optim.AdamW([*model.parameters(), *linear.parameters()], lr=1e-2, eps=1e-4)
    for step in range(3):
        batch = (full + step) % 32
        engines.loss(model(batch)).backward()
        engines.local_loss(engine, fm(placed.mine(batch))).backward()
        want = torch.nn.utils.clip_grad_norm_([*model.parameters(), *linear.parameters()], 0.05)
        got = torch.nn.utils.clip_grad_norm_(fm.parameters(), 0.05)
        if relative_error(engines.whole(got), want) > 1e-4:
            return [f"the norm is {engines.whole(got)}, not {want}"]
        for optimizer in (mine, theirs):
            optimizer.step()
            optimizer.zero_grad()
    bad = []
    for (name, p), q in zip(fm.trainable_modules.named_parameters(), linear.parameters(), strict=True):
        error = relative_error(engines.whole(p.detach()), q)
        if error > 1e-4:
            bad.append(f"{name} off by {error:.2g}")
    return bad


# a plan that leaves some parameters plain, as "tp" here, cannot be clipped with torch's own foreach, hooks or not
@pytest.mark.parametrize(("ranks", "engine"), [(2, "ddp"), (2, "fsdp2"), (2, "sp"), (4, "hsdp")])
@pytest.mark.parametrize("fused", [False, True])
def test_training(ranks: int, engine: str, fused: bool) -> None:
    assert run_world(ranks, _trained, engine, fused) == [[]] * ranks


def _auxiliary(engine: str) -> list[str]:
    """A loss made of the full tensor in a hook, left in save_ctx, counts once."""
    placed = engines.place(engine, models.net())
    fm = FlexModel(placed.model)
    full = models.tokens()

    def keep(module: nn.Module, x: Tensor, save_ctx: Any, modules: nn.ModuleDict) -> None:
        save_ctx.loss = (x - x.mean(0, keepdim=True)).pow(3).sum() * 0.1

    fm.register_forward_hook(HookFunction(SITE, editing_function=keep, capture=False))
    plain = models.net()
    seen: dict[str, Tensor] = {}

    def keep_plain(m: nn.Module, a: Any, o: Tensor) -> None:
        seen["loss"] = (o - o.mean(0, keepdim=True)).pow(3).sum() * 0.1

    plain.get_submodule(SITE).register_forward_hook(keep_plain)
    (engines.loss(plain(full)) + seen["loss"]).backward()
    parameters = dict(fm.named_parameters())
    output = fm(placed.mine(full))
    (engines.local_loss(engine, output) + fm.save_ctx.loss).backward()
    import parity

    return parity.wrong_gradients(fm, plain, copy.copy(parameters))


@pytest.mark.parametrize(("ranks", "engine"), [(2, "ddp"), (2, "fsdp2"), (2, "tp"), (2, "sp"), (4, "2d_tp")])
def test_auxiliary_loss(ranks: int, engine: str) -> None:
    assert run_world(ranks, _auxiliary, engine) == [[]] * ranks
