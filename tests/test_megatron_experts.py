"""Megatron-core's mixtures of experts: what has a whole is exact, and what has none is refused by name."""

from __future__ import annotations

from typing import Any

import megatron_cpu as megatron
import parity
import pytest
import torch
import torch.distributed as dist
from megatron_cpu import Spread
from oracle import Count
from test_megatron import alone, loss, perturbed, positions, tokens
from torch import nn
from worlds import run_world

MIXTURE: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_aux_loss_coeff": 0.0,
    "moe_router_load_balancing_type": "none",
    "moe_shared_expert_intermediate_size": 40,
}
# (sizes of parallel_state, the configuration)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sp=2, experts sp=2": ({"tp": 2}, {"sequence_parallel": True}),
    "sp=2, whole experts": (
        {"tp": 2, "expert_tensor_parallel_size": 1},
        {"sequence_parallel": True, "expert_tensor_parallel_size": 1},
    ),
    "sp=2, ep=2": (
        {"tp": 2, "expert_tensor_parallel_size": 1, "expert_model_parallel_size": 2},
        {"sequence_parallel": True, "expert_tensor_parallel_size": 1, "expert_model_parallel_size": 2},
    ),
    "dp=2": ({"tp": 1}, {}),
    "dp=2, ep=2": ({"tp": 1, "expert_model_parallel_size": 2}, {"expert_model_parallel_size": 2}),
    "dp=2, ep=2, all to all": (
        {"tp": 1, "expert_model_parallel_size": 2},
        {"expert_model_parallel_size": 2, "moe_token_dispatcher_type": "alltoall"},
    ),
}


@torch.no_grad()
def load_part(sharded: nn.Module, plain: nn.Module, ranks: int) -> None:
    """Also of experts: those of this rank carry numbers from 0."""
    from megatron.core import parallel_state as state

    whole = dict(plain.named_parameters())
    first = state.get_expert_model_parallel_rank() * (4 // state.get_expert_model_parallel_world_size())
    for name, parameter in sharded.named_parameters():
        rank, count = dist.get_rank() % ranks, ranks
        if ".local_experts." in name:
            head, _, rest = name.partition(".local_experts.")
            number, _, rest = rest.partition(".")
            name = f"{head}.local_experts.{first + int(number)}.{rest}"
            rank, count = state.get_expert_tensor_parallel_rank(), state.get_expert_tensor_parallel_world_size()
        parameter.copy_(megatron.part_of(whole[name].detach(), parameter, rank, count))


def pair(spread: Spread, changes: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    with spread.alone():
        torch.manual_seed(0)
        whole = {k: v for k, v in changes.items() if k.startswith("moe_token")}
        plain = perturbed(megatron.gpt(megatron.config(**MIXTURE, **whole)))
        if changes.get("sequence_parallel"):
            plain.embedding.reduce_scatter_embeddings = True
            plain.embedding.word_embeddings.reduce_scatter_embeddings = True
    sharded = megatron.gpt(megatron.config(**MIXTURE, **changes, tensor_model_parallel_size=spread.tp))
    load_part(sharded, plain, spread.tp)
    return sharded, plain


def _parity(case: str) -> Count:
    sizes, changes = CASES[case]
    spread = Spread(**sizes)
    sharded, plain = pair(spread, changes)
    full = tokens()
    mine = spread.mine(full)
    return parity.compare(
        sharded,
        plain,
        lambda m: loss(m(mine, positions(mine), None)),
        alone(spread, lambda m: loss(m(full, positions(full), None))),
    )


@pytest.mark.parametrize("case", CASES)
def test_every_module(case: str) -> None:
    for count in run_world(2, _parity, case):
        print(f"Megatron-core mixture, {case}: {count}")
        print(count.wrong)
        print([r for r in count.refused if "mlp.experts" not in r])
        assert not count.wrong
        assert all("mlp.experts" in r for r in count.refused)
