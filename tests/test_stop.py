"""``capture(stop=True)``: forwards end behind the last hook, with the oracle's values, and leave nothing behind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import engines
import models
import pytest
import torch
import torch.distributed as dist
from oracle import plain_hooks, relative_error
from pipelines import Pipe, step
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from worlds import run_world

from flex_model import FlexModel, HookFunction, edits
from flex_model.errors import MismatchError, RegistrationError

FIRST = ["emb", "layers.0", "layers.0.mlp", "layers.0.mlp.act"]


class Ran:
    """Which modules ran."""

    def __init__(self, model: nn.Module, *names: str) -> None:
        self.names: list[str] = []
        for name in names:
            model.get_submodule(name).register_forward_hook(lambda m, a, o, n=name: self.names.append(n))


def value(model: nn.Module, name: str, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return plain_hooks(model, lambda m: m(**batch).logits, backward=False)[name, "forward", 0][0]


def _is_whole(module: nn.Module) -> bool:
    return not all(isinstance(p, DTensor) for p in module.parameters(recurse=False))


def _resources(model: nn.Module) -> list[bool]:
    """Which parameters are whole in memory, of those that FSDP spreads."""
    held = [_is_whole(m) for m in model.modules() if isinstance(m, FSDPModule)]
    flat = [m._handle.flat_param._full_param_padded.untyped_storage().size() > 0  # type: ignore[union-attr]
            for m in FSDP.fsdp_modules(model) if m._handle is not None]  # fmt: skip
    return held + flat


def _train(fm: FlexModel, engine: str, ids: Tensor) -> list[Tensor]:
    engines.local_loss(engine, fm(ids)).backward()
    grads = [engines.whole(p.grad).clone() for p in fm.parameters() if p.grad is not None]
    fm.zero_grad()
    return grads


def _under(engine: str, grad: bool) -> None:
    plain = models.net()
    full = models.tokens()
    with torch.no_grad():
        want = plain_hooks(plain, lambda m: m(full), backward=False)
    placed = engines.place(engine, copy.deepcopy(plain))
    ran = Ran(placed.model, *[n for n, _ in placed.model.named_modules() if n.endswith(("layers.1", "head"))])
    fm, ids = FlexModel(placed.model), placed.mine(full)
    with torch.no_grad():
        fm(ids)
        before = _resources(placed.model)
        output = engines.whole(fm(ids))
    grads = _train(fm, engine, ids)
    with torch.no_grad(), fm.capture(*FIRST):  # layouts are found in whole forwards
        fm(ids)
    ran.names.clear()
    with torch.set_grad_enabled(grad), fm.capture(*FIRST, stop=True) as acts:
        assert fm(ids) is None
        ran.names.clear()  # forwards with gradients are probed first, to their end
        assert fm(ids) is None
    assert ran.names == []
    for name in FIRST:
        for value in acts.calls(name):
            assert relative_error(value, want[name, "forward", 0][0]) < 1e-5, name
    with torch.no_grad():
        assert _resources(placed.model) == before
        assert torch.equal(engines.whole(fm(ids)), output)
    after = _train(fm, engine, ids)
    assert len(after) == len(grads) and all(torch.equal(a, b) for a, b in zip(after, grads, strict=True))


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp1", "fsdp1_orig", "fsdp2", "tp", "sp", "tp_dtensors"])
def test_under_engines(engine: str, grad: bool) -> None:
    run_world(2, _under, engine, grad)


# torch's DDP over TP does not train after a forward without gradients, hooks or not.
@pytest.mark.parametrize("engine", ["hsdp", "2d_tp", "2d_sp"])
def test_under_engines_of_two_axes(engine: str) -> None:
    run_world(4, _under, engine, False)


def _collectives() -> list[dict[str, int]]:
    """Under FSDP2 parameters of the layers that do not run are not gathered."""
    placed = engines.place("fsdp2", models.net())
    fm, ids = FlexModel(placed.model), placed.mine(models.tokens())
    out = []
    with torch.no_grad():
        for stop in (False, True):
            with fm.capture("layers.0", stop=stop):
                fm(ids)
            with fm.capture("layers.0", deliver="local", stop=stop), CommDebugMode() as moved:
                fm(ids)
            out.append(
                {
                    str(op): n
                    for op, n in moved.get_comm_counts().items()
                    if "allgather" in str(op) or "all_gather" in str(op)
                }
            )
    return out


def test_collectives_of_layers_that_do_not_run() -> None:
    for whole, stopped in run_world(2, _collectives):
        assert sum(stopped.values()) == sum(whole.values()) - 1, (whole, stopped)


# -- pipelines -------------------------------------------------------------------------------------------------
def _pipeline(schedule: str, site: str, runs: set[str]) -> None:
    plain, ids = models.net(layers=4), models.tokens(batch=8)
    with torch.no_grad():
        want = plain_hooks(plain, lambda m: m(ids), backward=False)
    pipe = Pipe(plain, schedule)
    run, fm = pipe.schedule(), FlexModel(pipe.module)
    here = {n for part in pipe.parts for n, m in part.named_modules() if n.startswith("layers.") and n.count(".") == 1}
    ran = [Ran(part, *[n for n, _ in part.named_modules() if n in here]) for part in pipe.parts]
    with fm.capture(site):
        step(run, ids, train=False)
    for _ in range(2):
        for one in ran:
            one.names.clear()
        with fm.capture(site, stop=True) as acts:
            step(run, ids, train=False)
        assert relative_error(acts[site], want[site, "forward", 0][0]) < 1e-5
        assert {n for one in ran for n in one.names} == runs & here
    with fm.capture("head") as acts:
        step(run, ids, train=False)
    assert relative_error(acts["head"], want["head", "forward", 0][0]) < 1e-5
    if dist.get_rank() == 0 and schedule == "gpipe":
        with pytest.raises(RegistrationError, match=r"use the schedule's eval\(\)"), fm.capture(site, stop=True):
            step(run, ids)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved"])
@pytest.mark.parametrize("site", ["layers.0.mlp", "layers.2"])
def test_pipelines(schedule: str, site: str) -> None:
    runs = {"layers.0.mlp": set(), "layers.2": {"layers.0", "layers.1", "layers.2"}}[site]
    run_world(2, _pipeline, schedule, site, runs)


def _transformers(path: Path, sizes: dict[str, int]) -> None:
    from transformers.distributed import DistributedConfig

    plain, batch = models.make("llama"), models.inputs("llama")
    with torch.no_grad():
        want = plain_hooks(plain, lambda m: m(**batch).logits, backward=False)
    config = DistributedConfig(**sizes)
    model: Any = type(plain).from_pretrained(path, distributed_config=config, attn_implementation="eager").eval()
    fm = FlexModel(model)
    mine = {k: v.chunk(2)[dist.get_rank()] for k, v in batch.items()} if "fsdp_size" in sizes else batch
    for site in ("model.layers.0.mlp.act_fn", "model.layers.1"):
        with torch.no_grad(), fm.capture(site):
            before = fm(**mine).logits
        ran = Ran(model, *[n for n, _ in model.named_modules() if n == "model.layers.1.mlp"])
        with torch.no_grad(), fm.capture(site, stop=True) as acts:
            assert fm(**mine) is None
        assert relative_error(acts[site], want[site, "forward", 0][0]) < 1e-5
        assert bool(ran.names) == (site == "model.layers.1" and ("pp_size" not in sizes or dist.get_rank() == 1))
        with torch.no_grad():
            assert torch.equal(fm(**mine).logits, before)


@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"fsdp_size": 2}, {"pp_size": 2}], ids=str)
def test_transformers(sizes: dict[str, int], tmp_path: Path) -> None:
    models.make("llama").save_pretrained(tmp_path)  # type: ignore[operator]
    run_world(2, _transformers, tmp_path, sizes)


def test_weights_elsewhere_go_back() -> None:
    accelerate = pytest.importorskip("accelerate")
    plain, batch = models.make("llama"), models.inputs("llama")
    fm = FlexModel(accelerate.cpu_offload(models.make("llama"), execution_device=torch.device("cpu")))
    want = value(plain, "model.layers.0.mlp.act_fn", batch)
    with torch.no_grad(), fm.capture("model.layers.0.mlp.act_fn", stop=True) as acts:
        assert fm(**batch) is None
    assert torch.equal(acts["model.layers.0.mlp.act_fn"], want)
    assert all(p.is_meta for p in fm.module.parameters())
    with torch.no_grad():
        assert torch.equal(fm(**batch).logits, plain(**batch).logits)


@pytest.mark.parametrize("family", models.MIXTURES)
def test_inside_a_mixture_of_experts(family: str) -> None:
    model, batch = models.make(family), models.inputs(family)
    fm = FlexModel(model)
    site = next(n for n in reversed(fm.wrapped_module_names) if "experts" in n or "mlp" in n)
    with torch.no_grad(), fm.capture(site) as want:
        logits = fm(**batch).logits
    with torch.no_grad(), fm.capture(site, stop=True) as acts:
        assert fm(**batch) is None
    assert torch.equal(acts.calls(site)[0], want.calls(site)[0])
    with torch.no_grad():
        assert torch.equal(fm(**batch).logits, logits)


# -- what it waits for -----------------------------------------------------------------------------------------
def test_other_hooks_are_waited_for() -> None:
    model, ids = models.net(), models.tokens()
    ran = Ran(model, "layers.0", "layers.1", "norm", "head")
    fm = FlexModel(model, {})
    handle = fm.register_forward_pre_hook(HookFunction("norm"))
    with fm.capture("layers.0", stop=True), torch.no_grad():
        assert fm(ids) is None
    assert ran.names == ["layers.0", "layers.1"] and len(fm.output_ptr["norm"]) == 1
    handle.remove()
    ran.names.clear()
    with fm.capture("layers.0", stop=True), torch.no_grad():
        with fm.edit("layers.1.mlp", edits.zero()), fm.capture("layers.1") as inner:
            fm(ids)
        assert ran.names == ["layers.0", "layers.1"] and "layers.1" in inner
        fm(ids)
    assert ran.names == ["layers.0", "layers.1", "layers.0"]


def test_gradients_need_the_whole_forward() -> None:
    fm = FlexModel(models.net(), {})
    fm.register_full_backward_hook(HookFunction("layers.1"))
    with fm.capture("layers.0", stop=True) as acts:
        fm(models.tokens()).sum().backward()
        assert len(fm.output_ptr["layers.1"]) == 1 and "layers.0" in acts
        with torch.no_grad():
            assert fm(models.tokens()) is None


def test_the_first_of_several_calls() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    model[3] = model[1]
    fm = FlexModel(model)
    with fm.capture("1", stop=True) as acts:
        assert fm(torch.ones(2, 4)) is None
    assert len(acts.calls("1")) == 1


def test_a_residual_stream_is_looked_at_first() -> None:
    """Its sums need the whole layer."""
    fm = FlexModel(models.make("llama"))
    batch = models.inputs("llama")
    with torch.no_grad(), fm.capture(fm.at("resid_pre")) as want:
        fm(**batch)
    again = FlexModel(models.make("llama"))
    ran = Ran(again.module, "model.layers.0", "model.layers.1", "model.norm")
    for layer, names in ((0, ["model.layers.0"]), (0, []), (1, ["model.layers.0", "model.layers.1"])):
        with torch.no_grad(), again.capture(again.at("resid_pre", layer), stop=True) as acts:
            assert again(**batch) is None
        assert torch.equal(acts[f"@resid_pre.{layer}"], want[f"@resid_pre.{layer}"])
        assert ran.names == names
        ran.names.clear()


# -- who calls -------------------------------------------------------------------------------------------------
def test_somebody_elses_forward_ends_the_block() -> None:
    model, batch = models.make("llama"), models.inputs("llama")
    fm, done = FlexModel(model), []
    want = value(model, "model.layers.0", batch)
    with torch.no_grad():
        for call in (lambda: fm.generate(**batch, max_new_tokens=3), lambda: model(**batch)):
            with fm.capture("model.layers.0", stop=True) as acts:
                with fm.edit("model.layers.0.mlp.act_fn", edits.scale(1.0)):
                    call()
                done.append("past it")
            assert torch.equal(acts["model.layers.0"], want)
        assert not done and model(**batch).logits.shape == (4, 6, 66)
    assert "forward" not in model.__dict__ and not any(m._forward_hooks for m in model.modules())


def _in_a_block_of_its_own() -> None:
    placed = engines.place("fsdp2", models.net())
    fm, ids = FlexModel(placed.model), placed.mine(models.tokens())
    with torch.no_grad():
        with fm.capture("layers.0", stop=True) as acts, fm.edit("emb", lambda x: x * 2):
            placed.model(ids)
            raise AssertionError("the block ends there")
        assert acts["layers.0"].shape == (4, 6, 8)
        with fm.capture("head") as acts:
            fm(ids)
    assert acts["head"].shape == (4, 6, 32)


def test_somebody_elses_forward_on_ranks() -> None:
    run_world(2, _in_a_block_of_its_own)


# -- bad input -------------------------------------------------------------------------------------------------
def test_bad_input() -> None:
    fm = FlexModel(models.net())
    for options in ({"grad": True}, {"detach": False}, {"hook_type": "full_backward"}):
        with pytest.raises(RegistrationError, match="no gradient comes"), fm.capture("emb", stop=True, **options):
            pass


def test_an_error_before_it_is_an_error() -> None:
    model, ids = models.net(), models.tokens()
    fm = FlexModel(model)

    def broken(x: Tensor) -> Tensor:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"), fm.capture("layers.1", stop=True), fm.edit("layers.0", broken):
        fm(ids)
    assert fm(ids).shape == (4, 6, 32)


def _ranks_differ() -> str:
    fm = FlexModel(engines.place("ddp", models.net()).model)
    try:
        with fm.capture("layers.0", stop=dist.get_rank() == 0):
            fm(models.tokens())
    except MismatchError as error:
        return str(error)
    return ""


def test_ranks_that_differ_are_told() -> None:
    assert all("stop=True" in said for said in run_world(2, _ranks_differ))
