"""Engines put together, with checkpointing, compilation, mixed precision and offloading: every module, and edits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import engines
import models
import parity
import pytest
import torch
import torch.distributed as dist
from conftest import REGISTER, torch_hook
from oracle import relative_error
from test_edits_gradients import mix, mix_gradient
from torch import Tensor, nn
from torch.distributed._composable import replicate
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.func import functional_call, grad, vmap
from torch.nn.parallel import DistributedDataParallel as DDP
from worlds import run_world

from flex_model import FlexModel, HookFunction
from flex_model.errors import EngineError

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)


def checkpointed(model: nn.Module, *, reentrant: bool = False) -> nn.Module:
    impl = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    for i, layer in enumerate(model.layers):
        model.layers[i] = checkpoint_wrapper(layer, checkpoint_impl=impl)
    return model


def compiled(model: nn.Module) -> nn.Module:
    for layer in model.layers:
        layer.compile(backend="eager")
    return model


def ddp(model: nn.Module, **options: Any) -> engines.Placed:
    return engines.Placed(DDP(model, **options), dist.get_world_size(), dist.get_rank())


def fsdp2(model: nn.Module, **options: Any) -> engines.Placed:
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return engines.Placed(model, world, rank)


def two_axes(model: nn.Module, *, style: str, reentrant: bool) -> engines.Placed:
    """FSDP2 over tensor parallelism, each layer checkpointed."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("fsdp", "tp"))
    parallelize_module(model, mesh["tp"], engines.plan(style))
    checkpointed(model, reentrant=reentrant)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["fsdp"])
    fully_shard(model, mesh=mesh["fsdp"])
    return engines.Placed(model, mesh["fsdp"].size(), mesh["fsdp"].get_local_rank())


def replicated(model: nn.Module) -> engines.Placed:
    replicate(model)
    return engines.Placed(model, dist.get_world_size(), dist.get_rank())


def replicated_by_fsdp2(model: nn.Module) -> engines.Placed:
    from torch.distributed._composable.replicate_with_fsdp import replicate as replicate_with_fsdp

    for layer in model.layers:
        replicate_with_fsdp(layer)
    replicate_with_fsdp(model)
    return engines.Placed(model, dist.get_world_size(), dist.get_rank())


def replicated_over_tp(model: nn.Module) -> engines.Placed:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], engines.plan("tp"))
    replicate(model, device_mesh=mesh["dp"])
    return engines.Placed(model, 2, mesh["dp"].get_local_rank())


PLACES: dict[str, Callable[[nn.Module], engines.Placed]] = {
    "hsdp_tp": partial(engines.place, "hsdp_tp"),
    "2d_tp, checkpointed": partial(two_axes, style="tp", reentrant=False),
    "2d_tp, checkpointed, reentrant": partial(two_axes, style="tp", reentrant=True),
    "2d_sp, checkpointed": partial(two_axes, style="sp", reentrant=False),
    "ddp, checkpointed": lambda m: ddp(checkpointed(m)),
    "fsdp2, checkpointed": lambda m: fsdp2(checkpointed(m)),
    "fsdp2, checkpointed, reentrant": lambda m: fsdp2(checkpointed(m, reentrant=True)),
    "ddp, static graph": partial(ddp, static_graph=True),
    "ddp, static graph, checkpointed": lambda m: ddp(checkpointed(m), static_graph=True),
    "ddp, unused parameters": partial(ddp, find_unused_parameters=True),
    "ddp, buckets are gradients": partial(ddp, gradient_as_bucket_view=True),
    "replicate": replicated,
    "replicate, FSDP2's": replicated_by_fsdp2,
    "replicate over tp": replicated_over_tp,
    "fsdp2, offloaded": partial(fsdp2, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "fsdp2, not resharded": partial(fsdp2, reshard_after_forward=False),
    "fsdp2, bfloat16": partial(fsdp2, mp_policy=BF16),
    "ddp, compiled": lambda m: ddp(compiled(m)),
    "fsdp2, compiled": lambda m: fsdp2(compiled(m)),
}
RANKS = {"hsdp_tp": 8, "replicate over tp": 4, **{n: 4 for n in PLACES if n.startswith("2d")}}


def plain_of(name: str) -> nn.Module:
    return models.net().to(torch.bfloat16) if "bfloat16" in name else models.net()


def tolerance(name: str) -> float:
    return 3e-2 if "bfloat16" in name else 1e-5


def _parity(name: str) -> tuple[str, list[str], int]:
    placed, full = PLACES[name](models.net()), models.tokens()
    count = parity.compare(
        placed.model,
        plain_of(name),
        lambda m: engines.loss(m(placed.mine(full))),
        lambda m: engines.loss(m(full)),
        tolerance=tolerance(name),
    )
    return str(count), count.wrong + count.refused, count.tried


@pytest.mark.parametrize("name", PLACES)
def test_every_module(name: str) -> None:
    for text, problems, tried in run_world(RANKS.get(name, 2), _parity, name):
        print(f"{name}: {text}")
        assert not problems and tried == 62


EDITS = (
    ("layers.0.mlp.act", "forward"),
    ("layers.1", "forward_pre"),
    ("layers.0.norm", "full_backward"),
    ("layers.1.mlp.down", "full_backward_pre"),
)


def _edited(name: str) -> list[str]:
    bad = []
    for site, hook_type in EDITS:
        for run in ("every_rank", "one_rank"):
            fn = mix_gradient if "backward" in hook_type else mix
            plain, full = plain_of(name), models.tokens()
            torch_hook(plain, site, hook_type, fn)
            expected = plain(full)
            engines.loss(expected).backward()
            placed = PLACES[name](models.net())
            if name == "replicate over tp":  # else the first forward makes other parameters than those listed here
                replicate.state(placed.model).lazy_init()
            fm = FlexModel(placed.model)
            getattr(fm, REGISTER[hook_type])(HookFunction(site, editing_function=fn, capture=False, run=run))
            parameters = dict(fm.named_parameters())
            output = fm(placed.mine(full))
            engines.loss(output).backward()
            found = parity.wrong_gradients(fm, plain, parameters, tolerance(name) * (3 if "bf" in name else 1))
            if relative_error(engines.whole(fm.full_output(output)), expected) > tolerance(name):
                found.append("the output")
            bad += [f"{site} {hook_type} {run}: {found[:3]}"] if found else []
    return bad


@pytest.mark.parametrize("name", PLACES)
def test_edits(name: str) -> None:
    for bad in run_world(RANKS.get(name, 2), _edited, name):
        print(f"{name}, edits: {2 * len(EDITS) - len(bad)} exact of {2 * len(EDITS)}")
        assert not bad


# -- transforms of torch.func, and nn.DataParallel -----------------------------------------------------------------
def test_functional_call() -> None:
    fm, ids = FlexModel(models.net()), models.tokens()
    other = {n: p.detach() * 2 for n, p in fm.module.named_parameters()}
    want = functional_call(models.net(), other, (ids,))
    for model in (fm, fm.module):
        with fm.capture("head", "layers.0.mlp") as acts:
            assert torch.equal(functional_call(model, other, (ids,)), want)
        assert torch.equal(acts["head"], want)


def test_edits_inside_transforms() -> None:
    fm, plain, ids = FlexModel(models.net()), models.net(), models.tokens()
    torch_hook(plain, "layers.0", "forward", lambda x: x * 2)

    def loss(model: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
        return lambda parameters: engines.loss(functional_call(model, parameters, (ids,)))

    parameters = {n: p.detach() for n, p in plain.named_parameters()}
    with fm.edit("layers.0", lambda x: x * 2):
        each = vmap(lambda row: fm(row[None])[0])(ids)
        gradients = grad(loss(fm.module))(parameters)
    assert relative_error(each, plain(ids)) < 1e-5
    for name, want in grad(loss(plain))(parameters).items():
        assert torch.equal(gradients[name], want)


@pytest.mark.parametrize("grad_too", [False, True])
def test_captures_inside_transforms_are_refused(grad_too: bool) -> None:
    fm, ids = FlexModel(models.net(), {}), models.tokens()
    with fm.capture("head", grad=grad_too) as acts:
        with pytest.raises(EngineError, match=r"head \(forward\).*torch\.func.*vmap"):
            vmap(lambda row: fm(row[None]))(ids)
        fm(ids)
    assert acts["head"].shape == (4, 6, 32)
    fm.register_forward_hook(HookFunction("emb"))
    with pytest.raises(EngineError, match=r"emb \(forward\)"):
        vmap(lambda row: fm(row[None]))(ids)


def _refused_across_ranks() -> None:
    fm, ids = FlexModel(DDP(models.net())), models.tokens()
    with (
        pytest.raises(EngineError, match="exchanged between ranks"),
        fm.edit("head", lambda x: x * 2),
        torch.no_grad(),
    ):
        vmap(lambda row: fm(row[None]))(ids)


def test_transforms_across_ranks_are_refused() -> None:
    run_world(2, _refused_across_ranks)


@pytest.mark.parametrize("inside", [False, True])
def test_data_parallel_is_refused(inside: bool) -> None:
    model: nn.Module = nn.DataParallel(models.net())
    if inside:
        model = nn.Sequential(model)
    with pytest.raises(EngineError, match=r"nn\.DataParallel.*Wrap its \.module.*DistributedDataParallel.*device_map"):
        FlexModel(model)


# -- compilation ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["layers", "model"])
def test_hooks_put_on_after_the_compiled_model_ran(how: str) -> None:
    """What was compiled without a hook would not run it: while hooks are on, nothing compiled runs."""
    torch.compiler.reset()
    model, ids = models.net(), models.tokens()
    fm = FlexModel(compiled(model) if how == "layers" else torch.compile(model, backend="eager"))
    want = fm(ids)
    with fm.capture("layers.0.mlp", "head") as acts:
        fm(ids)
    assert relative_error(acts["head"], want) < 1e-6 and acts["layers.0.mlp"].shape == (4, 6, 8)
    with fm.edit("layers.0.mlp", lambda x: x * 0):
        edited = fm(ids)
    plain = models.net()
    torch_hook(plain, "layers.0.mlp", "forward", lambda x: x * 0)
    assert relative_error(edited, plain(ids)) < 1e-6 and relative_error(fm(ids), want) < 1e-6


def test_the_model_is_compiled_where_no_hook_is_on() -> None:
    torch.compiler.reset()
    ran: list[int] = []

    def backend(graph: Any, example: Any) -> Any:
        return lambda *args: (ran.append(1), graph.forward(*args))[1]

    fm, ids = FlexModel(torch.compile(models.net(), backend=backend)), models.tokens()
    fm(ids)
    assert ran
    ran.clear()
    with fm.capture("head"):
        fm(ids)
    assert not ran
    fm(ids)
    assert ran
