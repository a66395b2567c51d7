"""The seed's multi-process cases, by its own calls: registered hooks that edit, sizes given, ``output_ptr`` on the main
rank. DDP and FSDP are held against one process, and fairscale's TP=2 x DP=2 against DDP over 4 ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import engines
import fairscale_models
import models
import parity
import pytest
import torch
import torch.distributed as dist
from oracle import relative_error
from test_edits_gradients import mix, mix_gradient
from torch import Tensor, nn
from worlds import run_world

from flex_model import FlexModel, HookFunction
from flex_model.errors import MeshError

NET = {"emb": 8, "layers.0.mlp.act": 16, "layers.0.mlp.down": 8, "layers.1": 8, "head": 32}  # site: width
LLAMA = {
    "layers.0.attention.wv": 8,
    "layers.0.attention.wo": 16,
    "layers.1.feed_forward.act": 24,
    "layers.1.ffn_norm": 16,
}
LLAMA |= {"output": 32}
CASES = [(kind, expected) for kind in parity.TYPES for expected in (False, True)]


def sites(table: dict[str, int], kind: str) -> dict[str, int]:
    """Where a hook of this type has a tensor of the batch, the widths of its input or output."""
    inputs = {"emb": None, "layers.0.mlp.down": 16, "head": 8, "layers.0.attention.wv": 16, "output": 16}
    if kind in ("forward", "full_backward_pre"):
        return table
    return {name: inputs.get(name, width) for name, width in table.items() if inputs.get(name, width)}


class Seen(NamedTuple):
    """What a run leaves: captures by site (on the main rank), the whole output, whole gradients by parameter."""

    captured: dict[str, Tensor]
    output: Tensor
    gradients: dict[str, Tensor]

    def differences(self, other: Seen) -> list[str]:
        pairs = [("output", self.output, other.output)]
        pairs += [(f"capture of {n}", self.captured.get(n), t) for n, t in other.captured.items()]
        pairs += [(f"gradient of {n}", self.gradients.get(n), t) for n, t in other.gradients.items()]
        out = [f"{n} is missing" for n, mine, _ in pairs if mine is None]
        errors = [(n, relative_error(mine, theirs)) for n, mine, theirs in pairs if mine is not None]
        return out + [f"{n}: off by {e:.2g}" for n, e in errors if not e <= 1e-5]


def one_process(plain: nn.Module, kind: str, table: dict[str, int], batch: Tensor) -> Seen:
    """torch's own hooks."""
    captured: dict[str, Tensor] = {}

    def edited(name: str, x: Tensor) -> Tensor:
        captured[name] = x.detach().clone()
        return mix_gradient(x) if "backward" in kind else mix(x)

    for name in sites(table, kind):
        module = plain.get_submodule(name)
        if kind == "forward":
            module.register_forward_hook(lambda m, a, o, n=name: edited(n, o))
        elif kind == "forward_pre":
            module.register_forward_pre_hook(lambda m, a, n=name: (edited(n, a[0]), *a[1:]))
        elif kind == "full_backward":
            module.register_full_backward_hook(lambda m, gi, go, n=name: (edited(n, gi[0]), *gi[1:]))
        else:
            module.register_full_backward_pre_hook(lambda m, go, n=name: (edited(n, go[0]),))
    output = plain(batch)
    engines.loss(output).backward()
    return Seen(captured, output.detach(), {n: p.grad for n, p in plain.named_parameters() if p.grad is not None})


def by_the_seed(
    model: nn.Module, kind: str, expected: bool, table: dict[str, int], batch: Tensor, sizes: tuple[int, int]
) -> tuple[Seen, list[str]]:
    """FlexModel as the seed's README uses it, on this rank's part of the batch; and what is not as it says."""
    tensor, data = sizes
    output_dict: dict[str, list[Tensor]] = {}
    fm = FlexModel(model, output_dict, tensor_parallel_size=tensor, pipeline_parallel_size=1, data_parallel_size=data)

    def editing_function(current_module: nn.Module, inputs: Tensor, save_ctx: Any, modules: nn.ModuleDict) -> Tensor:
        save_ctx.activation = inputs
        return mix_gradient(inputs) if "backward" in kind else mix(inputs)

    wanted = sites(table, kind)
    for name, width in wanted.items():
        hook_function = HookFunction(
            module_name=name,
            expected_shape=(None, None, width) if expected else None,
            editing_function=editing_function,
        )
        getattr(fm, f"register_{kind}_hook")(hook_function)
    parameters = dict(fm.named_parameters())
    output = fm.forward(batch)
    engines.loss(output).backward()
    gradients = parity.full_gradients(fm, parameters)
    bad = []
    main = dist.get_rank() == 0
    if {n: len(v) for n, v in output_dict.items()} != (dict.fromkeys(wanted, 1) if main else {}):
        bad.append(f"output_ptr holds { ({n: len(v) for n, v in output_dict.items()}) }")
    if fm.save_ctx.activation.shape[0] != data * batch.shape[0]:
        bad.append(f"an edit saw {tuple(fm.save_ctx.activation.shape)}")
    captured = {n: v[0] for n, v in output_dict.items()}
    return Seen(captured, fm.full_output(output).detach(), gradients), bad


def _on_main(seen: Seen) -> Seen:
    return seen if dist.get_rank() == 0 else seen._replace(captured={})


# -- against one process -----------------------------------------------------------------------------------------
def _data_parallel(engine: str) -> tuple[int, list[str]]:
    full, problems, ranks = models.tokens(), [], dist.get_world_size()
    for kind, expected in CASES:
        plain = models.net()
        placed = engines.place(engine, copy.deepcopy(plain))
        seen, bad = by_the_seed(placed.model, kind, expected, NET, placed.mine(full), (1, ranks))
        bad += seen.differences(_on_main(one_process(plain, kind, NET, full)))
        problems += [f"{kind}, expected_shape {'' if expected else 'not '}given: {bad[:4]}"] if bad else []
    return len(CASES), problems


@pytest.mark.parametrize(("ranks", "engine"), [(2, "ddp"), (4, "fsdp1"), (2, "fsdp1_orig"), (2, "fsdp2")])
def test_data_parallel_against_one_process(ranks: int, engine: str) -> None:
    for tried, problems in run_world(ranks, _data_parallel, engine):
        print(f"the seed's cases, {engine} on {ranks} ranks: {tried - len(problems)} exact of {tried}")
        assert not problems


# -- fairscale against DDP ---------------------------------------------------------------------------------------
Pair = tuple[nn.Module, nn.Module, dict[str, int]]  # of fairscale's layers, plain, sites


def _net() -> Pair:
    fairscale_models.start()
    plain = models.net()
    return fairscale_models.exchanged(plain, "fairscale"), plain, NET


def _llama() -> Pair:
    return *fairscale_models.llama(), LLAMA


def _fairscale(pair: Callable[[], Pair]) -> tuple[int, list[str]]:
    full, problems = models.tokens(), []
    for kind, expected in CASES:
        model, plain, table = pair()
        ddp = engines.place("ddp", copy.deepcopy(plain))
        theirs, bad = by_the_seed(ddp.model, kind, expected, table, ddp.mine(full), (1, 4))
        mine, also_bad = by_the_seed(
            fairscale_models.with_ddp(model), kind, expected, table, fairscale_models.batch_part(full), (2, 2)
        )
        bad += also_bad + mine.differences(theirs)
        bad += mine.differences(_on_main(one_process(plain, kind, table, full)))
        problems += [f"{kind}, expected_shape {'' if expected else 'not '}given: {bad[:4]}"] if bad else []
    return len(CASES), problems


@pytest.mark.parametrize("pair", [_net, _llama])
def test_fairscale_against_ddp(pair: Callable[[], Pair]) -> None:
    for tried, problems in run_world(4, _fairscale, pair):
        print(f"the seed's cases, fairscale{pair.__name__} TP=2 x DP=2: {tried - len(problems)} exact of {tried}")
        assert not problems


# -- sizes -------------------------------------------------------------------------------------------------------
def _wrong_sizes() -> list[str]:
    fairscale_models.start()
    model = fairscale_models.with_ddp(fairscale_models.llama()[0])
    messages = []
    for tensor, pipeline, data in ((4, 1, 1), (2, 1, 4), (2, 2, 2)):
        with pytest.raises(MeshError) as caught:
            FlexModel(model, {}, tensor_parallel_size=tensor, pipeline_parallel_size=pipeline, data_parallel_size=data)
        messages.append(str(caught.value).split(" was given")[0])
    return messages


def test_sizes_that_contradict_the_model() -> None:
    for found in run_world(4, _wrong_sizes):
        assert found == ["tensor_parallel_size=4", "data_parallel_size=4", "pipeline_parallel_size=2"]


@torch.no_grad()
def _parameters() -> list[str]:
    model, plain = fairscale_models.llama()
    fm = FlexModel(fairscale_models.with_ddp(model))
    bad = []
    for name, parameter in plain.named_parameters():
        for shape in (None, tuple(parameter.shape)):
            if not torch.equal(fm.get_module_parameter(name, shape), parameter):
                bad.append(f"{name} with expected_shape {shape}")
    return bad


def test_module_parameters() -> None:
    assert run_world(4, _parameters) == [[]] * 4
