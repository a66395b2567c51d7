"""Megatron-core: its layers and GPTModel, sharded over tensor and data ranks, against the same model on one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import megatron_cpu as megatron
import parity
import pytest
import torch
from megatron_cpu import Spread
from oracle import Count, relative_error
from torch import Tensor, nn
from worlds import run_world

from flex_model import FlexModel, HookFunction

pytest.importorskip("megatron.core")


def tokens(batch: int = 4, length: int = 6) -> Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(1))


def positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]).expand(*ids.shape)


def loss(output: Any) -> Tensor:
    """Mean square of all logits, wherever they lie."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    whole = output if output.shape[-1] == 64 else gather_from_tensor_model_parallel_region(output)
    return whole.float().pow(2).mean()


def perturbed(model: nn.Module) -> nn.Module:
    """Biases start at zero and norms at one: all of them at random, so that a wrong order shows."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def pair(spread: Spread, changes: dict[str, Any], model: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """The model whole, and the same model over the tensor ranks."""
    with spread.alone():
        torch.manual_seed(0)
        whole = {**changes, "sequence_parallel": False}
        plain = perturbed(megatron.gpt(megatron.config(**whole), **model))
        if changes.get("sequence_parallel") and plain.embedding.word_embeddings.reduce_scatter_embeddings is False:
            # under sequence parallelism the layer itself turns [b, s, h] into [s, b, h]
            at_once = model.get("position_embedding_type", "rope") != "learned_absolute"
            plain.embedding.reduce_scatter_embeddings = at_once
            plain.embedding.word_embeddings.reduce_scatter_embeddings = at_once
    sharded = megatron.gpt(megatron.config(**changes, tensor_model_parallel_size=spread.tp), **model)
    megatron.load_part(sharded, plain, spread.tp)
    return sharded, plain


def alone(spread: Spread, run: Callable[[nn.Module], Tensor]) -> Callable[[nn.Module], Tensor]:
    def there(model: nn.Module) -> Tensor:
        with spread.alone():
            return run(model)

    return there


PLAIN_MLP = {
    "gated_linear_unit": False,
    "activation_func": torch.nn.functional.gelu,
    "add_bias_linear": True,
    "normalization": "LayerNorm",
}
LEARNED = {"position_embedding_type": "learned_absolute"}
TIED = {"share_embeddings_and_output_weights": True}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tp": ({}, {}),
    "sp": ({"sequence_parallel": True}, {}),
    "tp plain bias learned tied": (PLAIN_MLP, {**LEARNED, **TIED}),
    "sp plain bias learned": ({**PLAIN_MLP, "sequence_parallel": True}, LEARNED),
    "tp gated bias": ({"add_bias_linear": True}, {}),
    "sp gated bias tied": ({"sequence_parallel": True, "add_bias_linear": True}, TIED),
    "tp one key": ({"num_query_groups": 1}, {}),
    "tp all keys, qk norm": ({"num_query_groups": 4, "qk_layernorm": True}, {}),
    "sp all keys, qk norm": ({"num_query_groups": 4, "qk_layernorm": True, "sequence_parallel": True}, {}),
    "tp whole logits": ({}, {"parallel_output": False}),
    "tp offset softmax": ({"softmax_type": "learnable"}, {}),
}


def wrapped(model: nn.Module, data: str) -> nn.Module:
    """Under one of the ways to reduce gradients over data ranks."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    if data == "torch DDP":
        return nn.parallel.DistributedDataParallel(model, process_group=parallel_state.get_data_parallel_group())
    if data == "Megatron DDP":
        settings = DistributedDataParallelConfig(overlap_grad_reduce=True, bucket_size=1000)
        return DistributedDataParallel(model.config, settings, model)  # type: ignore[no-any-return]
    return model


def _parity(which: str, tp: int, data: str = "none") -> Count:
    spread = Spread(tp=tp)
    changes, model = MODELS[which]
    sharded, plain = pair(spread, changes, model)
    full = tokens()
    mine = spread.mine(full)
    return parity.compare(
        wrapped(sharded, data),
        plain,
        lambda m: loss(m(mine, positions(mine), None)),
        alone(spread, lambda m: loss(m(full, positions(full), None))),
    )


@pytest.mark.parametrize("which", MODELS)
def test_every_module(which: str) -> None:
    for count in run_world(2, _parity, which, 2):
        print(f"Megatron-core {which}: {count}")
        assert not count.wrong and not count.refused


DATA = ("none", "torch DDP", "Megatron DDP")


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(("ranks", "which"), [(2, "tp"), (4, "tp"), (4, "sp")])
def test_every_module_over_data_ranks(ranks: int, which: str, data: str) -> None:
    for count in run_world(ranks, _parity, which, ranks // 2, data):
        print(f"Megatron-core {which}={ranks // 2} dp=2, {data}: {count}")
        assert not count.wrong and not count.refused


# -- parameters ------------------------------------------------------------------------------------------------
def _parameters(which: str, tp: int, data: str = "none") -> tuple[int, list[str]]:
    """The full parameter, and its full gradient at two backwards."""
    spread = Spread(tp=tp)
    changes, model = MODELS[which]
    sharded, plain = pair(spread, changes, model)
    want: dict[str, list[Tensor]] = {n: [] for n, _ in plain.named_parameters()}
    output: dict[str, list[Tensor]] = {}
    fm = FlexModel(wrapped(sharded, data), output, deliver="all")
    bad = []
    for name, parameter in plain.named_parameters():
        parameter.register_hook(lambda g, name=name: want[name].append(g.clone()))
        fm.register_hook(HookFunction(name))
        if not torch.equal(fm.get_module_parameter(name), parameter):
            bad.append(f"{name}: another parameter")
    for step in range(2):
        full = (tokens() + step) % 64
        mine = spread.mine(full)
        with spread.alone():
            loss(plain(full, positions(full), None)).backward()
        loss(fm(mine, positions(mine), None)).backward()
    for name, expected in want.items():
        got = output.get(name, [])
        if len(got) != 2 or max(relative_error(g, w) for g, w in zip(got, expected, strict=True)) > 1e-5:
            bad.append(f"{name}: another gradient")
    return len(want), bad


@pytest.mark.parametrize("which", MODELS)
def test_parameters(which: str) -> None:
    for tried, bad in run_world(2, _parameters, which, 2):
        print(f"Megatron-core parameters, {which}: {tried - len(bad)} exact of {tried}")
        assert not bad


@pytest.mark.parametrize("data", DATA)
def test_parameters_over_data_ranks(data: str) -> None:
    for tried, bad in run_world(4, _parameters, "sp gated bias tied", 2, data):
        print(f"Megatron-core parameters, sp=2 dp=2, {data}: {tried - len(bad)} exact of {tried}")
        assert not bad
