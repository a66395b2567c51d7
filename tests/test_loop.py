"""A fine-tuning loop with a probe inside it, saved half way and resumed: step by step what one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engines
import models
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from oracle import relative_error
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.functional import cross_entropy
from worlds import run_world

from flex_model import FlexModel, HookFunction

SITE, STEPS, HALF, SHARE = "model.layers.0", 6, 3, 0.5


def probe() -> nn.Linear:
    torch.manual_seed(5)
    return nn.Linear(32, 3)


def batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(1, 60, (8, 6), generator=generator)
    return {"input_ids": ids, "labels": ids, "kinds": ids[:, 0] % 3}


def adamw(parameters: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-5, weight_decay=0.1)


def plain() -> tuple[list[list[float]], dict[str, Tensor]]:
    """Losses of the model and of the probe by step, and all weights at the end; no FlexModel."""
    model, linear, seen, losses = models.make("llama"), probe(), [], []
    model.get_submodule(SITE).register_forward_hook(lambda m, a, o: seen.append(linear(o[:, -1])))
    optimizer = adamw([*model.parameters(), *linear.parameters()])
    for step in range(STEPS):
        inputs = batch(step)
        kinds = inputs.pop("kinds")
        loss, own = model(**inputs).loss, cross_entropy(seen.pop(), kinds)
        (loss + SHARE * own).backward()
        nn.utils.clip_grad_norm_([*model.parameters(), *linear.parameters()], 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append([float(loss.detach()), float(own.detach())])
    weights = {**model.state_dict(), **{f"trainable_modules.probe.{k}": v for k, v in linear.state_dict().items()}}
    return losses, weights


def read(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> None:
    save_ctx.own = cross_entropy(modules["probe"](x[:, -1]), save_ctx.kinds)


class Loop:
    """The same on any number of ranks."""

    def __init__(self, fresh: bool) -> None:
        model, linear = models.make("llama"), probe()
        if not fresh:  # what is loaded must not have been there
            for parameter in (*model.parameters(), *linear.parameters()):
                nn.init.normal_(parameter)
        spread = dist.is_initialized()
        self.rank, self.parts = (dist.get_rank(), dist.get_world_size()) if spread else (0, 1)
        self.fm = FlexModel(engines.fully_sharded_hf(model) if spread else model)
        self.fm.register_trainable_module("probe", linear)
        self.fm.register_forward_hook(HookFunction(SITE, editing_function=read, capture=False))
        self.optimizer = adamw(self.fm.parameters())

    def run(self, steps: range) -> list[list[float]]:
        fm, losses = self.fm, []
        for step in steps:
            inputs = {k: v.chunk(self.parts)[self.rank] for k, v in batch(step).items()}
            fm.save_ctx.kinds = fm.full_batch(inputs.pop("kinds"))
            loss = fm(**inputs).loss
            (loss + SHARE * fm.save_ctx.own).backward()
            nn.utils.clip_grad_norm_(fm.parameters(), 0.5)
            self.optimizer.step()
            self.optimizer.zero_grad()
            whole = fm.full_batch(loss.detach()[None]).mean()
            losses.append([float(whole), float(fm.save_ctx.own.detach())])
        return losses

    def weights(self) -> dict[str, list[Any]]:
        return {k: engines.whole(v).tolist() for k, v in self.fm.state_dict().items()}

    def save(self, path: str) -> None:
        model, optimizer = get_state_dict(self.fm, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=path)

    def load(self, path: str) -> None:
        model, optimizer = get_state_dict(self.fm, self.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=path)
        set_state_dict(self.fm, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)


def _first_half(path: str) -> list[list[float]]:
    loop = Loop(fresh=True)
    losses = loop.run(range(HALF))
    loop.save(path)
    return losses


def _second_half(path: str) -> tuple[list[list[float]], dict[str, list[Any]]]:
    loop = Loop(fresh=False)
    loop.load(path)
    return loop.run(range(HALF, STEPS)), loop.weights()


@pytest.mark.parametrize("then", [2, 1, 0])
def test_a_probe_in_a_loop_that_is_resumed(then: int, tmp_path: Path) -> None:
    """On 2 ranks, then in a new world of as many, of one, or without any engine."""
    losses, weights = plain()
    path = str(tmp_path / "half")
    for first in run_world(2, _first_half, path):
        assert relative_error(torch.tensor(first), torch.tensor(losses[:HALF])) < 1e-5
    for second, found in run_world(then, _second_half, path) if then else [_second_half(path)]:
        assert relative_error(torch.tensor(second), torch.tensor(losses[HALF:])) < 1e-5
        assert found.keys() == weights.keys()
        for name, value in found.items():
            error = relative_error(torch.tensor(value), weights[name])
            assert error < 1e-5, f"{name} is off by {error:.1e}"


def test_the_loop_on_one_process() -> None:
    losses, weights = plain()
    loop = Loop(fresh=True)
    assert relative_error(torch.tensor(loop.run(range(STEPS))), torch.tensor(losses)) < 1e-6
    assert all(relative_error(torch.tensor(v), weights[n]) < 1e-5 for n, v in loop.weights().items())
    assert relative_error(probe().weight, weights["trainable_modules.probe.weight"]) > 0.1  # it went somewhere
