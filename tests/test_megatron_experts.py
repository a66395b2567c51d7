"""Megatron-core's mixtures of experts: what has a whole is exact, and what has none is refused by name."""

from __future__ import annotations

from typing import Any

import megatron_cpu as megatron
import parity
import pytest
import torch
import torch.distributed as dist
from megatron_cpu import Spread
from oracle import Count, relative_error
from test_megatron import alone, loss, perturbed, positions, tokens
from torch import Tensor, nn
from worlds import run_world

from flex_model import FlexModel, HookFunction
from flex_model.errors import LayoutError

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
    "dp=2, experts tp=2": ({"tp": 1, "expert_tensor_parallel_size": 2}, {"expert_tensor_parallel_size": 2}),
    "dp=2, ep=2": ({"tp": 1, "expert_model_parallel_size": 2}, {"expert_model_parallel_size": 2}),
    "dp=2, ep=2, all to all": (
        {"tp": 1, "expert_model_parallel_size": 2},
        {"expert_model_parallel_size": 2, "moe_token_dispatcher_type": "alltoall"},
    ),
}
# Where values inside experts come as rows, which test_megatron_rows compares one by one.
TOLD = [c for c in CASES if c not in ("sp=2, experts sp=2", "dp=2, experts tp=2")]


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
        whole = {k: v for k, v in changes.items() if k.startswith("moe_")}
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
        leave=lambda name: case in TOLD and ".mlp.experts" in name,
    )


@pytest.mark.parametrize("case", CASES)
def test_every_module(case: str) -> None:
    for count in run_world(2, _parity, case):
        print(f"Megatron-core mixture, {case}: {count}")
        print(count.wrong[:3])
        print([r for r in count.refused if "rows are tokens" not in r][:3])
        assert not count.wrong
        assert all(".mlp.experts" in r and "its rows are tokens at experts" in r for r in count.refused)
        assert bool(count.refused) == (case == "dp=2, experts tp=2")


def _routed(case: str, ranks: int) -> list[str]:
    """An edit over all rows of a router, captured before and after, in calls of other lengths; with gradients."""

    def edit(x: Tensor) -> Tensor:
        return x * 0.5 + 0.3 * x.flip(0) - 0.1 * x.mean(0, keepdim=True)

    sizes, changes = CASES[case]
    spread = Spread(**sizes)
    sharded, plain = pair(spread, changes)
    first, second = "decoder.layers.0.mlp.router", "decoder.layers.1.mlp.router"
    want: list[Tensor] = []
    plain.get_submodule(first).register_forward_hook(lambda m, a, o: (edit(o[0]), o[1]))
    plain.get_submodule(second).register_forward_hook(lambda m, a, o: want.append(o[0].detach().clone()))
    got: dict[Any, list[Tensor]] = {}
    picked: dict[Any, list[Tensor]] = {}
    fm, other = FlexModel(sharded, got, deliver="all"), FlexModel(sharded, picked, deliver="all")
    fm.register_forward_hook(HookFunction(first, editing_function=edit, capture=False))
    fm.register_forward_hook(HookFunction(second))
    other.register_forward_hook(HookFunction(second, select=(slice(1, 7, 2), 0)))
    bad = []
    for length in (6, 8, 4, 6):
        full = tokens(length=length)
        mine = spread.mine(full)
        with spread.alone():
            expected = plain(full, positions(full), None)
            loss(expected).backward()
        output = fm(mine, positions(mine), None)
        loss(output).backward()
        if relative_error(fm.full_output(output), expected) > 1e-5:
            bad.append(f"the output at length {length}")
        if relative_error(got[second][-1], want[-1]) > 1e-5:
            bad.append(f"the rows of {second} at length {length}")
        if relative_error(picked[second][-1], want[-1][1:7:2, 0]) > 1e-5:
            bad.append(f"the selected rows of {second} at length {length}")
    with fm.capture(f"{first}.weight", hook_type="tensor") as acts:
        grads: list[Tensor] = []
        handle = plain.get_parameter(f"{first}.weight").register_hook(lambda g: grads.append(g.clone()))
        with spread.alone():
            loss(plain(full, positions(full), None)).backward()
        handle.remove()
        loss(fm(mine, positions(mine), None)).backward()
    if relative_error(acts[f"{first}.weight"], grads[0]) > 1e-5:
        bad.append("the gradient of the router's weight")
    return bad


@pytest.mark.parametrize(
    ("ranks", "case"), [(2, "dp=2"), (2, "dp=2, ep=2"), (2, "sp=2, ep=2"), (4, "sp=2, experts sp=2")]
)
def test_rows_of_routers(ranks: int, case: str) -> None:
    """[s, b] flattened to rows is interleaved over data ranks, in as many blocks as the sequence is long."""
    for bad in run_world(ranks, _routed, case, ranks):
        assert not bad


def _ragged() -> list[Any]:
    """Ranks whose sequences differ in length: the parts, each in its own order; and an edit sees its own."""
    spread = Spread(tp=1)
    sharded, _ = pair(spread, {})
    mine = tokens(2, 4 + dist.get_rank())
    name = "decoder.layers.0.mlp.router"
    seen = []
    fm = FlexModel(sharded)

    def edit(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return x

    with fm.capture(name) as acts, fm.edit(name, edit):
        fm(mine, positions(mine), None)
    value = acts[name]
    return [[tuple(t.shape) for t in value.tensors], seen]  # type: ignore[union-attr]


def test_rows_of_unequal_lengths() -> None:
    for rank, (parts, seen) in enumerate(run_world(2, _ragged)):
        assert parts == [(8, 4), (10, 4)] and seen == [(8 + 2 * rank, 4)]


def _parameters(case: str) -> list[Any]:
    """Of experts: (whether there is a whole, whether it and its gradient are the oracle's, or the refusal)"""
    sizes, changes = CASES[case]
    spread = Spread(**sizes)
    sharded, plain = pair(spread, changes)
    name = "decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight"
    want: list[Tensor] = []
    plain.get_parameter(name).register_hook(lambda g: want.append(g.clone()))
    fm = FlexModel(sharded)
    full = tokens()
    mine = spread.mine(full)
    with spread.alone():
        loss(plain(full, positions(full), None)).backward()
    out: list[Any] = []
    try:
        out.append(torch.equal(fm.get_module_parameter(name), plain.get_parameter(name)))
    except LayoutError as error:
        out.append(str(error))
    with fm.capture(name, hook_type="tensor") as acts:
        loss(fm(mine, positions(mine), None)).backward()
    try:
        out.append(relative_error(acts[name], want[0]) < 1e-5)
    except LayoutError as error:
        out.append(str(error))
    return out


@pytest.mark.parametrize("case", CASES)
def test_parameters_of_experts(case: str) -> None:
    for whole, gradient in run_world(2, _parameters, case):
        if "ep=2" in case:
            assert "other ranks have other experts by this name" in whole
            assert "other ranks have other experts by this name" in gradient
        elif case == "dp=2, experts tp=2":
            assert whole is True and "sharded over ranks that are no axis of the model" in gradient
        else:
            assert whole is True and gradient is True
