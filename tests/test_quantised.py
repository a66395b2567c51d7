"""Weights in 8 (and 4) bits, on the CPU: values, gradients through them, edits, and the numbers they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import engines
import models
import parity
import pytest
import torch
import torch.distributed as dist
from conftest import torch_hook
from oracle import relative_error
from test_edits_gradients import mix
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from worlds import run_world

from flex_model import FlexModel, HookFunction
from flex_model.errors import NameNotFoundError, RegistrationError


def torchao(model: nn.Module, dynamic: bool = False) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    config = quantization.Int8DynamicActivationInt8WeightConfig if dynamic else quantization.Int8WeightOnlyConfig
    quantization.quantize_(model, config())
    return model


def quanto(model: nn.Module) -> nn.Module:
    library = pytest.importorskip("optimum.quanto")
    library.quantize(model, weights=library.qint8)
    library.freeze(model)
    return model


def bitsandbytes(model: nn.Module, layer: str, **options: Any) -> nn.Module:
    library = pytest.importorskip("bitsandbytes")
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
        new = getattr(library.nn, layer)(linear.in_features, linear.out_features, bias=False, **options)
        new.load_state_dict(linear.state_dict())
        new.support_avx512bf16_for_cpu = False  # the same numbers on every machine
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new.to("cpu"))
    return model


def of_torch(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torchao int8": torchao,
    "torchao int8, dynamic": lambda m: torchao(m, dynamic=True),
    "quanto int8": quanto,
    "bitsandbytes int8": lambda m: bitsandbytes(m, "Linear8bitLt", has_fp16_weights=False),
    "bitsandbytes nf4": lambda m: bitsandbytes(m, "Linear4bit", quant_type="nf4"),
    "torch dynamic int8": of_torch,
}
WITHOUT_GRADIENTS = ("torchao int8, dynamic", "torch dynamic int8")  # their kernels have no backward

# What the libraries cannot run themselves: by kind and engine, the words of their error.
TORCHAO = "Int8Tensor dispatch: attempting to run unimplemented operator/function"
CANNOT = {
    ("torchao int8", "tp"): TORCHAO,
    ("torchao int8, dynamic", "tp"): TORCHAO,
    ("quanto int8", "tp"): "does not have a sharding strategy registered",
    ("bitsandbytes int8", "fsdp2"): "'Parameter' object has no attribute 'CB'",
    ("bitsandbytes int8", "tp"): "'DTensor' object has no attribute 'CB'",
    ("bitsandbytes nf4", "tp"): "Creating a new Tensor subclass Params4bit",
    ("torch dynamic int8", "tp"): "ColwiseParallel currently only support nn.Linear",
}
CASES = [(k, e) for k in KINDS for e in ("none", "ddp", "fsdp2", "tp")]


def quantised(kind: str) -> nn.Module:
    """Only the embedding is trained, so that gradients go through all quantised layers."""
    model = KINDS[kind](models.net(width=32, hidden=64)).requires_grad_(False)
    model.emb.weight.requires_grad_(kind not in WITHOUT_GRADIENTS)
    return model


def place(engine: str, kind: str) -> engines.Placed:
    model = quantised(kind)
    if engine == "none":
        return engines.Placed(model)
    world, rank = dist.get_world_size(), dist.get_rank()
    packed = {p for p in model.parameters() if "Int8Tensor" in type(p).__name__}
    if engine == "ddp" and not any(p.requires_grad for p in model.parameters()):
        model.emb.weight.requires_grad_()
    if engine == "ddp":  # torchao's cannot be broadcast, so the ranks must start alike
        return engines.Placed(DDP(model, init_sync=not packed), world, rank)
    if engine == "fsdp2" and packed:  # nor split: they stay whole on every rank
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
        fully_shard(model, mesh=mesh, ignored_params=packed)
        return engines.Placed(model, world, rank)
    return engines.place(engine, model)


def tolerance(kind: str, engine: str) -> float:
    # torch scales activations by the range of what it is given: a rank's part of the batch is rounded in other steps.
    return 5e-2 if kind == "torch dynamic int8" and engine != "none" else 1e-5


def _parity(kind: str, engine: str) -> tuple[str, list[str], int]:
    placed, full = place(engine, kind), models.tokens()
    learns = kind not in WITHOUT_GRADIENTS
    with torch.set_grad_enabled(learns):
        count = parity.compare(
            placed.model,
            quantised(kind),
            lambda m: engines.loss(m(placed.mine(full))),
            lambda m: engines.loss(m(full)),
            types=parity.TYPES if learns else parity.TYPES[:2],
            tolerance=tolerance(kind, engine),
        )
    return str(count), count.wrong + count.refused, count.tried


def run(engine: str, function: Any, *args: object) -> list[Any]:
    return [function(*args)] if engine == "none" else run_world(2, function, *args)


@pytest.mark.parametrize(("kind", "engine"), [c for c in CASES if c not in CANNOT])
def test_every_module(kind: str, engine: str) -> None:
    quantised(kind)  # skips where the library is not there
    for text, problems, tried in run(engine, _parity, kind, engine):
        print(f"{kind}/{engine}: {text}")
        assert not problems and tried == (32 if kind in WITHOUT_GRADIENTS else 62)


def _fails_by_itself(kind: str, engine: str) -> None:
    placed = place(engine, kind)
    placed.model(placed.mine(models.tokens()))


@pytest.mark.parametrize(("kind", "engine"), CANNOT)
def test_what_a_library_cannot_run(kind: str, engine: str) -> None:
    quantised(kind)
    print(f"{kind}/{engine}: not run, {CANNOT[kind, engine]}")
    with pytest.raises(AssertionError) as failure:
        run_world(2, _fails_by_itself, kind, engine)
    assert CANNOT[kind, engine] in str(failure.value)


def _edited(kind: str, engine: str) -> list[str]:
    """An edit between quantised layers: the output, and the gradient that goes through them to the embedding."""
    bad = []
    for site in ("layers.0.mlp.act", "layers.1.mlp.down", "layers.0"):
        placed, plain, full = place(engine, kind), quantised(kind), models.tokens()
        torch_hook(plain, site, "forward", mix)
        expected = plain(full)
        engines.loss(expected).backward()
        fm = FlexModel(placed.model, deliver="all")
        fm.register_hook(HookFunction("emb.weight"))
        with fm.edit(site, mix):
            output = fm(placed.mine(full))
            engines.loss(output).backward()
        if relative_error(fm.full_output(output), expected) > 1e-5:
            bad.append(f"{site}: the output")
        if relative_error(fm.output_ptr["emb.weight"][0], plain.emb.weight.grad) > 1e-5:
            bad.append(f"{site}: the gradient")
    return bad


@pytest.mark.parametrize(
    ("kind", "engine"), [(k, e) for k, e in CASES if (k, e) not in CANNOT and k not in WITHOUT_GRADIENTS]
)
def test_edits(kind: str, engine: str) -> None:
    quantised(kind)
    for bad in run(engine, _edited, kind, engine):
        print(f"{kind}, edits/{engine}: {6 - len(bad)} exact of 6")
        assert not bad


def _weights(kind: str, engine: str, called: bool) -> list[str]:
    placed = place(engine, kind)
    fm, bad = FlexModel(placed.model), []
    if called:
        fm(placed.mine(models.tokens()))
    identity = torch.eye(64)
    for name in ("layers.0.mlp.down", "head"):
        weight = fm.get_module_parameter(f"{name}.weight")
        layer = quantised(kind).get_submodule(name)
        want = layer(identity[: layer.in_features, : layer.in_features]).detach().T  # what the layer multiplies by
        if type(weight) is not torch.Tensor or weight.dtype != torch.float32 or relative_error(weight, want) > 1e-2:
            bad.append(f"{name}: {type(weight).__name__} {weight.dtype} {relative_error(weight, want):.2g}")
    return bad


@pytest.mark.parametrize(
    ("kind", "engine"), [(k, e) for k, e in CASES if (k, e) not in CANNOT and k != "torch dynamic int8"]
)
@pytest.mark.parametrize("called", [False, True])
def test_a_weight_is_the_numbers_it_stands_for(kind: str, engine: str, called: bool) -> None:
    quantised(kind)
    assert run(engine, _weights, kind, engine, called) == [[]] * (1 if engine == "none" else 2)


def test_a_weight_that_its_layer_has_packed_anew() -> None:
    """In evaluation bitsandbytes packs the weights again, for CPUs that multiply in bfloat16."""
    library = pytest.importorskip("bitsandbytes")
    if not library.functional.has_avx512bf16():
        pytest.skip("this CPU does not multiply in bfloat16")
    layer = library.nn.Linear4bit(64, 32, bias=False, quant_type="nf4").to("cpu").eval()
    fm = FlexModel(nn.Sequential(layer))
    before = fm.get_module_parameter("0.weight")
    identity = torch.eye(64)
    multiplied = layer(identity).T  # from now on packed otherwise
    after = fm.get_module_parameter("0.weight")
    assert relative_error(before, multiplied) < 1e-2 and relative_error(after, before) < 1e-2
    assert relative_error(layer(identity).T, multiplied) == 0


def test_what_has_no_gradient_or_no_parameter_is_named() -> None:
    fm = FlexModel(quantised("torch dynamic int8"))
    with pytest.raises(NameNotFoundError, match=r"'head\.weight' matches no parameter"):
        fm.get_module_parameter("head.weight")
    fm = FlexModel(quantised("torchao int8"))
    with pytest.raises(RegistrationError, match="does not require a gradient"):
        fm.register_hook(HookFunction("head.weight"))
