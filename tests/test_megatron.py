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
from flex_model.errors import MeshError

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


# -- other calls -----------------------------------------------------------------------------------------------
def _with_labels(which: str) -> Count:
    """The model's own loss, over logits that stay sharded."""
    spread = Spread(tp=2)
    sharded, plain = pair(spread, *MODELS[which])
    ids = tokens()

    def run(model: nn.Module) -> Tensor:
        return model(ids, positions(ids), None, labels=ids.roll(1, -1)).mean()

    return parity.compare(sharded, plain, run, alone(spread, run))


def test_own_loss() -> None:
    for count in run_world(2, _with_labels, "sp"):
        print(f"Megatron-core sp, its own loss: {count}")
        assert not count.wrong and not count.refused


def _half() -> Count:
    spread = Spread(tp=2)
    changes = {"sequence_parallel": True, "params_dtype": torch.bfloat16, "bf16": True}
    sharded, plain = pair(spread, changes, {})
    ids = tokens()
    return parity.compare(
        sharded.bfloat16(),
        plain.bfloat16(),
        lambda m: loss(m(ids, positions(ids), None)),
        alone(spread, lambda m: loss(m(ids, positions(ids), None))),
        tolerance=6e-2,
    )


def test_bfloat16() -> None:
    """Sums in another order round differently, by a few units in the last of 8 bits."""
    for count in run_world(2, _half):
        print(f"Megatron-core sp in bfloat16: {count}")
        assert not count.wrong and not count.refused


def _shared_keys() -> Count:
    """Four ranks share two groups of keys: each key is on two of them, and is no shard of anything."""
    spread = Spread(tp=4)
    sharded, plain = pair(spread, {}, {})
    ids = tokens()
    return parity.compare(
        sharded,
        plain,
        lambda m: loss(m(ids, positions(ids), None)),
        alone(spread, lambda m: loss(m(ids, positions(ids), None))),
    )


def test_fewer_keys_than_ranks() -> None:
    for count in run_world(4, _shared_keys):
        print(f"Megatron-core tp=4, two groups of keys: {count}")
        assert not count.wrong
        keys = ("k_layernorm.", "core_attention.forward_pre[1]", "core_attention.forward_pre[2]")
        gradients = ("core_attention.full_backward[1]", "core_attention.full_backward[2]")
        assert len(count.refused) == 2 * 8
        assert all(any(place in r.split(": ")[0] for place in (*keys, *gradients)) for r in count.refused)


def _decoded() -> list[bool]:
    """Without gradients, at lengths that the layouts were not found at."""
    spread = Spread(tp=2)
    sharded, plain = pair(spread, *MODELS["sp"])
    names = ("decoder.layers.0.mlp.linear_fc1", "decoder.layers.1", "output_layer", "embedding")
    want: dict[str, list[Tensor]] = {n: [] for n in names}
    for name in names:
        keep = want[name].append
        plain.get_submodule(name).register_forward_hook(
            lambda m, a, o, keep=keep: keep(o if torch.is_tensor(o) else o[0])
        )
    got: dict[str, list[Tensor]] = {}
    fm = FlexModel(sharded, got, deliver="all")
    for name in names:
        fm.register_forward_hook(HookFunction(name))
    with torch.no_grad():
        for batch, length in ((4, 6), (2, 8), (1, 4), (3, 10)):
            ids = tokens(batch, length)
            with spread.alone():
                plain(ids, positions(ids), None)
            fm(ids, positions(ids), None)
    return [relative_error(g, w) < 1e-5 for n in names for g, w in zip(got[n], want[n], strict=True)]


def test_other_lengths() -> None:
    assert run_world(2, _decoded) == [[True] * 16] * 2


def _checkpointed(which: str) -> Count:
    """Megatron's own recomputation of whole layers: every value once, and its gradient."""
    spread = Spread(tp=2)
    changes, model = MODELS[which]
    again = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    sharded, plain = pair(spread, {**changes, **again}, model)
    plain.config.recompute_granularity = None
    plain.decoder.config.recompute_granularity = None
    ids = tokens()
    return parity.compare(
        sharded.train(),
        plain.train(),
        lambda m: loss(m(ids, positions(ids), None)),
        alone(spread, lambda m: loss(m(ids, positions(ids), None))),
    )


def test_recomputed_layers() -> None:
    for count in run_world(2, _checkpointed, "sp"):
        print(f"Megatron-core sp, layers recomputed: {count}")
        assert not count.wrong and not count.refused


def _wrappers() -> list[bool]:
    """Under Megatron's wrappers names and keys are the plain model's; a state comes back."""
    from megatron.core.transformer.module import Float16Module

    spread = Spread(tp=1)
    changes = {"params_dtype": torch.bfloat16, "bf16": True}
    sharded, plain = pair(spread, changes, {})
    model = wrapped(Float16Module(sharded.config, sharded), "Megatron DDP")
    fm = FlexModel(model)
    ids = spread.mine(tokens())
    name = "decoder.layers.0.mlp"
    with torch.no_grad(), fm.capture(name, "module.module." + name) as acts:
        fm(ids, positions(ids), None)
    return [
        fm.wrapped_module_names == [n for n, _ in plain.named_modules()],
        [n for n, _ in fm.named_parameters()] == [n for n, _ in plain.named_parameters()],
        set(fm.state_dict()) == set(plain.state_dict()),
        "Megatron-core" in fm._runtime.engines.names and bool(set(acts) & {name, "module.module." + name}),
    ]


def test_wrappers() -> None:
    assert run_world(2, _wrappers) == [[True] * 4] * 2


def _over_context() -> str:
    Spread(tp=1, context_parallel_size=2)
    from megatron.core.tensor_parallel import ColumnParallelLinear

    layer = ColumnParallelLinear(8, 8, config=megatron.config(), init_method=nn.init.xavier_normal_)
    try:
        FlexModel(layer)
    except MeshError as error:
        return str(error)
    return ""


def test_context_parallel_is_refused() -> None:
    assert all("context parallelism" in refusal for refusal in run_world(2, _over_context))
