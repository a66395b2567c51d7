"""Edits under Megatron-core that mix over the sharded dim and the batch: outputs and gradients equal the oracle's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import megatron_cpu as megatron
import pytest
import torch
import torch.distributed as dist
from megatron_cpu import Spread
from oracle import relative_error
from test_megatron import MODELS, loss, pair, positions, tokens, wrapped
from torch import Tensor, nn
from worlds import run_world

from flex_model import FlexModel, HookFunction
from flex_model.trees import find_leaves, replace_leaves

LAYER = "decoder.layers.0"
# (module, hook type, index of the tensor, width of its last dim)
SITES = (
    (f"{LAYER}.mlp.linear_fc1", "forward", 0, 96),  # gate | up, both sharded
    (f"{LAYER}.mlp.linear_fc1", "forward", 1, 96),  # and their bias
    (f"{LAYER}.mlp.linear_fc1", "full_backward_pre", 0, 96),
    (f"{LAYER}.mlp.linear_fc2", "forward_pre", 0, 48),
    (f"{LAYER}.mlp.linear_fc2", "full_backward", 0, 48),
    (f"{LAYER}.mlp.linear_fc2", "forward", 1, 32),  # a bias that is added to a part of the sequence
    (f"{LAYER}.mlp.linear_fc2", "full_backward_pre", 1, 32),
    (f"{LAYER}.mlp", "forward", 0, 32),
    (f"{LAYER}.self_attention.linear_qkv", "forward", 0, 64),
    (f"{LAYER}.self_attention.linear_qkv", "full_backward_pre", 0, 64),
    (f"{LAYER}.self_attention.core_attention", "forward_pre", 0, 8),
    (f"{LAYER}.self_attention.core_attention", "full_backward", 2, 8),
    (f"{LAYER}.input_layernorm", "forward", 0, 32),
    (LAYER, "forward", 0, 32),
    ("decoder.layers.1", "full_backward", 0, 32),
    ("embedding.word_embeddings", "forward", 0, 32),
    ("output_layer", "forward_pre", 0, 32),
    ("output_layer", "forward", 0, 64),
)
FEW = (0, 2, 3, 5, 8, 13)


def mix(x: Tensor) -> Tensor:
    """Over the features, the heads or the batch, and the sequence."""
    over = x - x.mean(-1, keepdim=True) - 0.4 * x.flip(0)
    if x.dim() > 2:
        over = over - 0.2 * x.mean(1, keepdim=True) - 0.3 * x.mean(2, keepdim=True)
    return torch.tanh(over) * 1.5


def mix_gradient(g: Tensor) -> Tensor:
    return g * 2 - g.flip(0) + 0.3 * g.flip(-1) + 0.1 * g.mean(1 if g.dim() > 1 else 0, keepdim=True)


def plain_edit(module: nn.Module, hook_type: str, index: int, fn: Callable[[Tensor], Tensor]) -> None:
    def new(value: Any) -> Any:
        tensor = find_leaves(value)[index].tensor
        if "backward" not in hook_type:
            return replace_leaves(value, {index: fn(tensor)})
        alias = tensor.view_as(tensor)
        alias.register_hook(fn)
        return replace_leaves(value, {index: alias})

    if hook_type in ("forward", "full_backward_pre"):
        module.register_forward_hook(lambda m, args, output: new(output))
    else:
        module.register_forward_pre_hook(lambda m, args, kwargs: new((args, kwargs)), with_kwargs=True)


def finished(model: nn.Module, spread: Spread, data: str) -> dict[str, Tensor]:
    """The gradients as an optimizer would find them: after what Megatron does when the backward is done."""
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads

    if data == "Megatron DDP":
        finalize_model_grads([model])
        return {n.removeprefix("module."): p.main_grad for n, p in model.named_parameters()}  # type: ignore[misc]
    out = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        later = getattr(parameter, "sequence_parallel", False) or "q_layernorm" in name or "k_layernorm" in name
        if later and spread.tp > 1:
            dist.all_reduce(grad, group=parallel_state.get_tensor_model_parallel_group())
        if data == "none" and spread.data > 1:
            dist.all_reduce(grad, group=parallel_state.get_data_parallel_group())
            grad /= spread.data
        out[name.removeprefix("module.")] = grad
    return out


def problems(
    spread: Spread, which: str, site: tuple[str, str, int, int], run: str, trainable: bool, data: str
) -> list[str]:
    name, hook_type, index, width = site
    torch.manual_seed(3)
    probe = nn.Linear(width, width)
    mine = copy.deepcopy(probe)
    base = mix_gradient if "backward" in hook_type else mix
    sharded, plain = pair(spread, *MODELS[which])
    full = tokens()
    plain_edit(plain.get_submodule(name), hook_type, index, (lambda x: mix(probe(x))) if trainable else base)
    with spread.alone():
        expected = plain(full, positions(full), None)
        loss(expected).backward()
    model = wrapped(sharded, data)
    fm = FlexModel(model)

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
    register(HookFunction(name, editing_function=edit, run=run, unpack_idx=index))
    part = spread.mine(full)
    output = fm(part, positions(part), None)
    loss(output).backward()
    bad = []
    if (error := relative_error(fm.full_output(output), expected)) > 1e-5:
        bad.append(f"output off by {error:.2g}")
    whole = dict(plain.named_parameters())
    marks = {n.removeprefix("module."): p for n, p in model.named_parameters()}
    for key, grad in finished(model, spread, data).items():
        want = whole[key].grad
        assert want is not None
        want = megatron.part_of(want, marks[key], dist.get_rank() % spread.tp, spread.tp)
        if (error := relative_error(grad, want)) > 1e-5:
            bad.append(f"{key} off by {error:.2g}")
    for (key, p), (_, q) in zip(mine.named_parameters(), probe.named_parameters(), strict=True):
        if trainable and (error := relative_error(p.grad, q.grad)) > 1e-5:  # type: ignore[arg-type]
            bad.append(f"{key} of the trainable module off by {error:.2g}")
    return bad


def _edits(which: str, tp: int, sites: tuple[int, ...], datas: tuple[str, ...]) -> list[tuple[int, list[str]]]:
    spread = Spread(tp=tp)
    return [_edits_over(spread, which, sites, data) for data in datas]


def _edits_over(spread: Spread, which: str, sites: tuple[int, ...], data: str) -> tuple[int, list[str]]:
    """Every other forward edit uses a trainable module; under the other model, or other data ranks, the others do."""
    tried, bad, turn = 0, [], which.startswith("sp") + (data == "torch DDP")
    for i in sites:
        site = SITES[i]
        for j, run in enumerate(("every_rank", "one_rank", "sharded")):
            if run != "every_rank" and i not in FEW:
                continue
            tried += 1
            trainable = "backward" not in site[1] and (i + j + turn) % 2 == 1
            if found := problems(spread, which, site, run, trainable, data):
                bad.append(f"{site} {run} trainable={trainable}: {found[:3]}")
    return tried, bad


@pytest.mark.parametrize("which", ["tp gated bias", "sp gated bias tied"])
def test_two_ranks(which: str) -> None:
    for ((tried, bad),) in run_world(2, _edits, which, 2, tuple(range(len(SITES))), ("none",)):
        print(f"Megatron-core edits, {which}: {tried - len(bad)} exact of {tried}")
        assert not bad and tried == 30


def test_four_ranks() -> None:
    datas = ("none", "torch DDP", "Megatron DDP")
    for results in run_world(4, _edits, "sp gated bias tied", 2, (0, 2, 5), datas, timeout=280):
        for data, (tried, bad) in zip(datas, results, strict=True):
            print(f"Megatron-core edits, sp=2 dp=2, {data}: {tried - len(bad)} exact of {tried}")
            assert not bad and tried == 9
