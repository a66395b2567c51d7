"""Edits and parameters on fairscale's layers: outputs and all gradients equal the oracle's, however run."""

from __future__ import annotations

from collections.abc import Callable

import engines
import fairscale_models
import models
import parity
import pytest
import test_edits_gradients
import test_parameters
import torch
from oracle import relative_error
from test_edits_gradients import mix, mix_gradient, plain_edit
from torch import Tensor, nn
from worlds import run_world

from flex_model import FlexModel, HookFunction

RUNS = ("every_rank", "one_rank", "sharded")
ENGINES = [(2, e) for e in engines.FAIRSCALE_TWO_RANKS] + [(4, e) for e in engines.FAIRSCALE_FOUR_RANKS]


@pytest.mark.parametrize("engine", ["fairscale", "fairscale_gathered"])
def test_edits_of_the_net(engine: str) -> None:
    few = engine != "fairscale"
    for tried, bad in run_world(2, test_edits_gradients.all_of, engine, few):
        print(f"{engine}: {tried - len(bad)} exact of {tried}")
        assert not bad and tried == (15 if few else 66)


def test_edits_of_the_net_on_four_ranks() -> None:
    names = engines.FAIRSCALE_FOUR_RANKS
    for results in run_world(4, test_edits_gradients.few_of, names, timeout=280):
        for engine, (tried, bad) in zip(names, results, strict=True):
            print(f"{engine}: {tried - len(bad)} exact of {tried}")
            assert not bad and tried == 15


@pytest.mark.parametrize(("ranks", "engine"), ENGINES)
def test_full_parameter(ranks: int, engine: str) -> None:
    assert run_world(ranks, test_parameters._full_parameters, engine) == [[]] * ranks


@pytest.mark.parametrize(("ranks", "engine"), ENGINES)
@pytest.mark.parametrize("backwards", [1, 3])
def test_parameter_gradient(ranks: int, engine: str, backwards: int) -> None:
    assert run_world(ranks, test_parameters._gradients, engine, backwards) == [[]] * ranks


@pytest.mark.parametrize(("ranks", "engine"), ENGINES)
def test_edited_parameter_gradient(ranks: int, engine: str) -> None:
    assert run_world(ranks, test_parameters._edited, engine) == [[]] * ranks


# -- the LLaMA ---------------------------------------------------------------------------------------------------
SITES = {  # width of the last dim
    "layers.0.attention.wq": 16,
    "layers.0.attention.scores": 6,
    "layers.0.attention": 16,
    "layers.1.feed_forward.act": 24,
    "layers.1.feed_forward.w2": 16,
    "layers.1": 16,
    "tok_embeddings": 16,
}
TYPES: dict[str, tuple[str, ...]] = {
    "layers.1.feed_forward.w2": ("forward", "full_backward_pre"),  # its input is as wide as act's output
    "tok_embeddings": ("forward", "full_backward_pre"),
}


def _problems(site: str, hook_type: str, run: str, trainable: bool, expected: bool, ddp: bool) -> list[str]:
    model, plain = fairscale_models.llama()
    width = SITES[site]
    torch.manual_seed(3)
    probe, mine = nn.Linear(width, width), nn.Linear(width, width)
    mine.load_state_dict(probe.state_dict())
    base: Callable[[Tensor], Tensor] = mix_gradient if "backward" in hook_type else mix
    full = models.tokens()
    plain_edit(plain, site, hook_type, (lambda x: mix(probe(x))) if trainable else base)
    want = plain(full)
    engines.loss(want).backward()

    fm = FlexModel(fairscale_models.with_ddp(model) if ddp else model)

    def edit(module: nn.Module, x: Tensor, save_ctx: object, modules: nn.ModuleDict) -> Tensor:
        return mix(modules["probe"](x)) if trainable else base(x)

    if trainable:
        fm.register_trainable_module("probe", mine)
    dims = 4 if site.endswith("scores") else 3
    shape = (*(None,) * (dims - 1), width) if expected else None
    getattr(fm, f"register_{hook_type}_hook")(HookFunction(site, shape, edit, run=run))
    parameters = dict(fm.named_parameters())
    output = fm(fairscale_models.batch_part(full))
    engines.loss(output).backward()
    if not ddp:
        fairscale_models.reduce_gradients(model)
    error = relative_error(fm.full_output(output), want)
    bad = [f"output off by {error:.2g}"] if error > 1e-5 else []
    bad += parity.wrong_gradients(fm, plain, parameters)
    for p, q in zip(mine.parameters(), probe.parameters(), strict=True) if trainable else ():
        if (error := relative_error(p.grad, q.grad)) > 1e-5:
            bad.append(f"probe off by {error:.2g}")
    return bad


def _llama(ddp: bool, few: bool) -> tuple[int, list[str]]:
    """Every site, hook type and way to run; every other forward edit uses a trainable module, and every other two are
    told the shape. ``few``: every hook type and way to run, each at one of the sites, at others with DDP."""
    tried, wrong = 0, []
    for t, hook_type in enumerate(parity.TYPES):
        sites = [s for s in SITES if hook_type in TYPES.get(s, parity.TYPES)]
        for j, run in enumerate(RUNS):
            for i, site in enumerate([sites[(3 * t + j + 2 * ddp) % len(sites)]] if few else sites):
                tried += 1
                turn = i + j + t
                trainable = "backward" not in hook_type and (turn + ddp) % 2 == 1
                found = _problems(site, hook_type, run, trainable, turn // 2 % 2 == 1, ddp)
                if found:
                    wrong.append(f"{site} {hook_type} {run} trainable={trainable}: {found[:3]}")
    return tried, wrong


def _llamas(ddps: tuple[bool, ...], few: bool) -> list[tuple[int, list[str]]]:
    return [_llama(ddp, few) for ddp in ddps]


@pytest.mark.parametrize(("ranks", "ddps"), [(2, (False,)), (4, (False, True))])
def test_edits_of_the_llama(ranks: int, ddps: tuple[bool, ...]) -> None:
    for results in run_world(ranks, _llamas, ddps, ranks == 4, timeout=280):
        for ddp, (tried, wrong) in zip(ddps, results, strict=True):
            print(f"fairscale LLaMA on {ranks} ranks{', DDP' * ddp}, edits: {tried - len(wrong)} exact of {tried}")
            assert not wrong and tried == (12 if ranks == 4 else 72)
