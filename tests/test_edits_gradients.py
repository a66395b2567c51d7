"""Edits that mix across the sharded dim and the batch: outputs and all gradients equal the oracle's, however run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import engines
import models
import parity
import pytest
import torch
from oracle import relative_error
from torch import Tensor, nn
from worlds import run_world

from flex_model import FlexModel, HookFunction

SITES = ("layers.0.mlp.act", "layers.0.mlp.up", "layers.0.mlp.down", "layers.1", "emb", "layers.0.norm")
FEW = {
    ("layers.0.mlp.act", "forward"),
    ("layers.0.mlp.act", "full_backward"),
    ("layers.1", "forward_pre"),
    ("layers.0.mlp.down", "full_backward_pre"),
    ("emb", "forward"),
}
WIDE = {
    "layers.0.mlp.up": ("forward", "full_backward_pre"),
    "layers.0.mlp.act": parity.TYPES,
    "layers.0.mlp.down": ("forward_pre", "full_backward"),
}


def mix(x: Tensor) -> Tensor:
    return torch.tanh(x - x.mean(-1, keepdim=True) - 0.5 * x.mean(0, keepdim=True)) * 1.5


def mix_gradient(g: Tensor) -> Tensor:
    return g * 2 - g.mean(0, keepdim=True) + torch.cat([g[..., 1:], g[..., :1]], -1)


def plain_edit(model: nn.Module, site: str, hook_type: str, fn: Callable[[Tensor], Tensor]) -> None:
    module = model.get_submodule(site)
    if hook_type == "forward":
        module.register_forward_hook(lambda m, a, o: fn(o))
    elif hook_type == "forward_pre":
        module.register_forward_pre_hook(lambda m, a: (fn(a[0]), *a[1:]))
    elif hook_type == "full_backward":
        module.register_full_backward_hook(lambda m, gi, go: (fn(gi[0]), *gi[1:]))
    else:
        module.register_full_backward_pre_hook(lambda m, go: (fn(go[0]),))


def problems(engine: str, site: str, hook_type: str, run: str, trainable: bool) -> list[str]:
    torch.manual_seed(3)
    probe = nn.Linear(*[16 if hook_type in WIDE.get(site, ()) else 8] * 2).to(engines.device)
    mine = copy.deepcopy(probe)
    base = mix_gradient if "backward" in hook_type else mix
    full = models.tokens().to(engines.device)
    plain = models.net().to(engines.device)
    plain_edit(plain, site, hook_type, (lambda x: mix(probe(x))) if trainable else base)
    expected = plain(full)
    engines.loss(expected).backward()

    placed = engines.place(engine, models.net().to(engines.device))
    fm = FlexModel(placed.model)

    def edit(module: nn.Module, x: Tensor, save_ctx: object, modules: nn.ModuleDict) -> Tensor:
        return mix(modules["probe"](x)) if trainable else base(x)

    if trainable:
        fm.register_trainable_module("probe", mine)
    register = {
        "forward": fm.register_forward_hook,
        "forward_pre": fm.register_forward_pre_hook,
        "full_backward": fm.register_full_backward_hook,
        "full_backward_pre": fm.register_full_backward_pre_hook,
    }[hook_type]
    register(HookFunction(site, editing_function=edit, run=run))
    parameters = dict(fm.named_parameters())
    output = fm(placed.mine(full))
    engines.local_loss(engine, output).backward()
    bad = []
    error = relative_error(engines.whole(fm.full_output(output)), expected)
    if error > 1e-5:
        bad.append(f"output off by {error:.2g}")
    bad += parity.wrong_gradients(fm, plain, parameters)
    if trainable:
        for (name, p), (_, q) in zip(fm.trainable_modules.named_parameters(), probe.named_parameters(), strict=True):
            error = relative_error(engines.whole(p.grad), q.grad)
            if error > 1e-5:
                bad.append(f"{name} off by {error:.2g}")
    return bad


def all_of(engine: str, few: bool) -> tuple[int, list[str]]:
    """Every site, hook type and way to run; every other forward edit uses a trainable module, the others under the next
    engine."""
    tried, bad, turn = 0, [], engines.ALL.index(engine)
    for i, site in enumerate(SITES):
        for hook_type in parity.TYPES:
            if site == "emb" and hook_type in ("forward_pre", "full_backward"):
                continue  # token ids
            if few and (site, hook_type) not in FEW:
                continue
            for j, run in enumerate(("every_rank", "one_rank", "sharded")):
                tried += 1
                trainable = "backward" not in hook_type and (i + j + turn) % 2 == 1
                found = problems(engine, site, hook_type, run, trainable)
                if found:
                    bad.append(f"{site} {hook_type} {run} trainable={trainable}: {found[:3]}")
    return tried, bad


@pytest.mark.parametrize("engine", [e for e in engines.TWO_RANKS if e not in ("tp_local_head", "loss_parallel")])
def test_two_ranks(engine: str) -> None:
    few = engine in ("tp_dtensors", "fsdp1")
    for tried, bad in run_world(2, all_of, engine, few):
        print(f"{engine}: {tried - len(bad)} exact of {tried}")
        assert not bad and tried == (15 if few else 66)


def few_of(names: Sequence[str]) -> list[tuple[int, list[str]]]:
    """Several engines in one world, which share what DTensor finds out about operations on such a mesh."""
    return [all_of(engine, True) for engine in names]


def test_four_ranks() -> None:
    for results in run_world(4, few_of, engines.FOUR_RANKS, timeout=280):
        for engine, (tried, bad) in zip(engines.FOUR_RANKS, results, strict=True):
            print(f"{engine}: {tried - len(bad)} exact of {tried}")
            assert not bad and tried == 15
