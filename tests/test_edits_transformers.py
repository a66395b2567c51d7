"""Edits on models that transformers has distributed: logits and all parameters' gradients equal the oracle's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engines
import models
import pytest
import torch
import torch.distributed as dist
from oracle import relative_error
from parity import square
from torch import Tensor
from worlds import run_world

from flex_model import FlexModel, HookFunction

SITES = ("model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.act_fn", "model.layers.1")


def mix(x: Tensor) -> Tensor:
    return torch.tanh(x - x.mean(-1, keepdim=True) - 0.5 * x.mean(0, keepdim=True)) * 1.5


def mix_gradient(g: Tensor) -> Tensor:
    return g * 2 - g.mean(0, keepdim=True) + g.flip(-1)


def load(family: str, path: str, config: dict[str, int]) -> Any:
    from transformers.distributed import DistributedConfig

    kind = type(models.make(family))
    options = {"distributed_config": DistributedConfig(**config), "attn_implementation": "eager"}
    return kind.from_pretrained(path, **options).eval()


def problems(family: str, path: str, config: dict[str, int], site: str, run: str, backward: bool) -> list[str]:
    plain = models.make(family)
    module = plain.get_submodule(site)
    if backward:
        module.register_full_backward_pre_hook(lambda m, g: (mix_gradient(g[0]),))
    else:
        module.register_forward_hook(lambda m, a, o: mix(o))
    full = models.inputs(family)
    want = plain(**full)
    square(want).backward()
    fm = FlexModel(load(family, path, config))
    if backward:
        fm.register_full_backward_pre_hook(HookFunction(site, editing_function=mix_gradient, run=run))
    else:
        fm.register_forward_hook(HookFunction(site, editing_function=mix, run=run))
    parts = dist.get_world_size() // config.get("tp_size", 1)
    mine = {k: v.chunk(parts)[dist.get_rank() // config.get("tp_size", 1)] for k, v in full.items()}
    got = fm(**mine, use_cache=False)
    square(got).backward()
    bad = []
    error = relative_error(fm.full_output(got).logits, want.logits)
    if error > 1e-5:
        bad.append(f"logits off by {error:.2g}")
    grads = {n: engines.whole(p.grad) for n, p in fm.named_parameters() if p.grad is not None}
    for name, parameter in plain.named_parameters():
        error = relative_error(grads[name], parameter.grad) if name in grads else float("nan")
        if not error <= 1e-5:
            bad.append(f"{name} off by {error:.2g}")
    return bad


def _all(family: str, path: str, config: dict[str, int]) -> tuple[int, list[str]]:
    """Every site and way to run, forward and backward; forward and backward in turn on four ranks and with experts."""
    tried, bad, half = 0, [], family != "llama" or len(config) > 1
    for i, site in enumerate(SITES):
        if family != "llama" and "act_fn" in site:
            continue  # experts
        for j, run in enumerate(("every_rank", "one_rank", "sharded")):
            for backward in (False, True):
                if half and (i + j) % 2 != backward:
                    continue
                tried += 1
                found = problems(family, path, config, site, run, backward)
                bad += [f"{site} {run} backward={backward}: {found[:3]}"] if found else []
    return tried, bad


@pytest.mark.parametrize(
    ("family", "ranks", "config"),
    [
        ("llama", 2, {"tp_size": 2}),
        ("qwen3_moe", 2, {"tp_size": 2}),
        ("llama", 2, {"fsdp_size": 2}),
        ("llama", 4, {"tp_size": 2, "fsdp_size": 2}),
    ],
)
def test_edits(family: str, ranks: int, config: dict[str, int], tmp_path: Path) -> None:
    models.make(family).save_pretrained(tmp_path)
    for tried, bad in run_world(ranks, _all, family, str(tmp_path), config):
        print(f"edits, {family}/{config}: {tried - len(bad)} exact of {tried}")
        assert not bad and tried == (9 if family != "llama" else 24 if ranks == 2 else 12)
