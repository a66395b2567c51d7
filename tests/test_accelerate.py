"""A training loop with accelerate, and models that accelerate dispatches, with hooks on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from oracle import relative_error
from torch import Tensor, nn
from torch.utils.data import DataLoader
from worlds import run_world

from flex_model import FlexModel, HookFunction, Site
from flex_model.errors import RegistrationError

accelerate = pytest.importorskip("accelerate")

STEPS, ACCUMULATED, BATCH = 2, 2, 4
LOOKED_AT, EDITED = "model.layers.0.mlp", "model.layers.1.mlp"


def accelerator(engine: str) -> Any:
    options: dict[str, Any] = {}
    accelerate.PartialState(cpu=True)
    if engine == "fsdp2":
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        # It has FSDP for accelerators only; told that the ranks are some, it shards CPU tensors as well.
        accelerate.PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        options["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
        )
    return accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED, **options)


def rows() -> list[dict[str, Tensor]]:
    ids = models.inputs("llama", BATCH * ACCUMULATED * STEPS)["input_ids"]
    return [{"input_ids": row, "labels": row} for row in ids]


def probe() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(32, 32)


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-3)


def use(module: nn.Module, x: Tensor, save_ctx: object, modules: nn.ModuleDict) -> Tensor:
    return modules["probe"](x)


def oracle() -> dict[str, Any]:
    """One process, torch's own hooks."""
    model = models.make("llama")
    model.probe = probe()
    model.get_submodule(EDITED).register_forward_hook(lambda m, a, out: model.probe(out))
    seen: list[Tensor] = []
    gradients: list[Tensor] = []

    def look(module: nn.Module, args: Any, out: Tensor) -> None:
        seen.append(out.detach().clone())
        out.register_hook(lambda g: gradients.append(g.clone()))

    model.get_submodule(LOOKED_AT).register_forward_hook(look)
    adam, of_probe = optimizer(model.parameters()), []
    for i, batch in enumerate(DataLoader(rows(), BATCH)):
        (model(**batch).loss / ACCUMULATED).backward()
        if i % ACCUMULATED == ACCUMULATED - 1:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            of_probe.append([p.grad.clone() for p in model.probe.parameters()])
            adam.step()
            adam.zero_grad()
    return {"seen": seen, "gradients": gradients, "probe": of_probe, "state": model.state_dict()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def hook(fm: FlexModel) -> FlexModel:
    fm.register_trainable_module("probe", probe())
    fm.register_forward_hook(HookFunction(LOOKED_AT))
    fm.register_full_backward_pre_hook(HookFunction(LOOKED_AT))
    fm.register_forward_hook(HookFunction(EDITED, editing_function=use, capture=False))
    return fm


def prepared(engine: str, wrapped: bool) -> tuple[Any, FlexModel, nn.Module, Any]:
    """accelerate around FlexModel, or FlexModel around what accelerate made; the model to call, its optimizers."""
    with_it = accelerator(engine)
    if wrapped:
        fm = hook(FlexModel(models.make("llama"), deliver="all"))
        model, adam = with_it.prepare(fm, optimizer(fm.parameters()))
        return with_it, fm, model, [adam]
    plain = models.make("llama")
    model, adam = with_it.prepare(plain, optimizer(plain.parameters()))
    fm = hook(FlexModel(model, deliver="all"))
    return with_it, fm, model, [adam, optimizer(fm.trainable_modules.parameters())]


def state_of(fm: FlexModel) -> dict[str, Tensor]:
    of_probe = {n: whole(p.detach()).clone() for n, p in fm.trainable_modules.named_parameters()}
    return {n: fm.get_module_parameter(n) for n, _ in fm.named_parameters() if "trainable" not in n} | of_probe


def close(got: Tensor, want: Tensor) -> bool:
    return relative_error(got, want) < 1e-5


def _trained(engine: str, wrapped: bool, folder: Path) -> None:
    want = oracle()
    with_it, fm, model, optimizers = prepared(engine, wrapped)
    loader = with_it.prepare(DataLoader(rows(), BATCH // dist.get_world_size()))
    of_probe = []
    for batch in loader:
        with with_it.accumulate(model):
            with_it.backward((model if wrapped else fm)(**batch).loss)
            if with_it.sync_gradients:
                with_it.clip_grad_norm_(fm.parameters(), 1.0)
                of_probe.append([whole(p.grad).clone() for p in fm.trainable_modules.parameters()])
            for adam in optimizers if with_it.sync_gradients else []:
                adam.step()
                adam.zero_grad()
    captured = fm.output_ptr[LOOKED_AT], fm.output_ptr[Site(LOOKED_AT, "full_backward_pre", 0)]
    for got, values in zip(captured, (want["seen"], want["gradients"]), strict=True):
        assert len(got) == STEPS * ACCUMULATED
        assert all(close(g, v) for g, v in zip(got, values, strict=True))
    for got, values in zip(of_probe, want["probe"], strict=True):
        assert all(close(g, v) for g, v in zip(got, values, strict=True))
    state = state_of(fm)
    assert state.keys() == want["state"].keys() and all(close(state[n], v) for n, v in want["state"].items())
    _saved_and_loaded(with_it, fm, wrapped, folder / f"{engine}-{wrapped}")


def _saved_and_loaded(with_it: Any, fm: FlexModel, wrapped: bool, folder: Path) -> None:
    """accelerate's checkpoint holds the probe too where it was given FlexModel."""
    before = state_of(fm)
    with_it.save_state(str(folder))
    with_it.wait_for_everyone()
    with torch.no_grad():
        for parameter in fm.parameters() if wrapped else fm.module.parameters():
            parameter.mul_(0.5)
    with_it.load_state(str(folder))
    after = state_of(fm)
    assert all(torch.equal(after[n], value) for n, value in before.items())


@pytest.mark.parametrize("wrapped", [True, False], ids=["prepared_flex_model", "flex_model_of_prepared"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_loop(engine: str, wrapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run_world(2, _trained, engine, wrapped, tmp_path)


def _dispatched(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.dispatch_model(model, device_map={"": "cpu"}, main_device="cpu", force_hooks=True)


def _offloaded(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def _on_disk(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))


HALF = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu"}
AWAY = ("model.layers.1", "model.norm", "lm_head")


def _half_on_disk(model: nn.Module, folder: Path) -> nn.Module:
    away = {name: "disk" for name in AWAY}
    return accelerate.dispatch_model(model, device_map=HALF | away, main_device="cpu", offload_dir=str(folder))


PLACES = [_dispatched, _offloaded, _on_disk, _half_on_disk]


@pytest.mark.parametrize("place", PLACES)
def test_gradients_of_dispatched(place: Callable[[nn.Module, Path], nn.Module], tmp_path: Path) -> None:
    """Of values, with an edit in the way, and of weights; those that are made anew for each forward are refused."""
    batch, names = models.inputs("llama"), [n for n, _ in models.make("llama").named_parameters()]
    plain, fm = FlexModel(models.make("llama"), {}), FlexModel(place(models.make("llama"), tmp_path), {})
    here = [n for n in names if not fm.module.get_parameter(n).is_meta]
    assert len(here) == {_dispatched: len(names), _half_on_disk: 10}.get(place, 0)
    captures = []
    for model in (plain, fm):
        for name in here:
            model.register_hook(HookFunction(name))
        with model.edit(EDITED, lambda x: torch.tanh(x)), model.capture("**", grad=True) as acts:
            model(**batch).logits.pow(2).mean().backward()
        captures.append(acts)
    want, got = captures
    for key in want:
        for a, b in zip(got.calls(key), want.calls(key), strict=True):
            assert torch.equal(a, b)
        if key in want._grads.values:
            assert all(close(a, b) for a, b in zip(got.grads(key), want.grads(key), strict=True))
    for name in names:
        if name in here:
            assert close(fm.output_ptr[name][0], plain.output_ptr[name][0])
        else:
            with pytest.raises(RegistrationError, match=f"{name} .*no hook can meet this gradient: it is offloaded"):
                fm.register_hook(HookFunction(name))


@pytest.mark.parametrize("place", PLACES)
def test_dispatched(place: Callable[[nn.Module, Path], nn.Module], tmp_path: Path) -> None:
    batch = models.inputs("llama")
    plain = FlexModel(models.make("llama"))
    fm = FlexModel(place(models.make("llama"), tmp_path))
    outputs, captures = [], []
    for model in (plain, fm):
        with (
            torch.no_grad(),
            model.edit(EDITED, lambda x: x * 2),
            model.capture("**", unpack_idx="all") as acts,
        ):
            outputs.append(model(**batch).logits)
        captures.append(acts)
    assert torch.equal(*outputs)
    want, got = captures
    assert list(got) == list(want) and len(list(got)) > 20
    for key in want:
        assert all(torch.equal(a, b) for a, b in zip(got.calls(key), want.calls(key), strict=True))
    for name in plain.module.state_dict():
        assert torch.equal(fm.get_module_parameter(name), plain.get_module_parameter(name))
