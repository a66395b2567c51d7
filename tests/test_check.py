"""``check``: runs that are the same are called so whatever holds them, and a fault is named where it begins."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import engines
import models
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from worlds import run_world

from flex_model import FlexModel
from flex_model.check import CheckFailed, Place, Run, RunError, diff, record

ENGINES = ("ddp", "fsdp1", "fsdp1_orig", "fsdp2", "tp", "tp_local_head", "tp_dtensors", "loss_parallel", "sp")
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # CommDebugMode's own hooks


def _one_process(model: nn.Module | None = None, **keywords: Any) -> Run:
    fm = FlexModel(models.net() if model is None else model)
    with record(fm, **keywords) as run:
        engines.loss(fm(models.tokens())).backward()
    return run


# -- the same, however it lies ---------------------------------------------------------------------------------
def _recorded(engine: str, path: Path | None) -> tuple[Run, dict[str, int], dict[str, int], Any, list[str]]:
    placed = engines.place(engine, models.net())
    fm, mine = FlexModel(placed.model), placed.mine(models.tokens())
    report = fm.check(mine)

    def step() -> None:
        engines.local_loss(engine, fm(mine)).backward()

    counts = []
    with CommDebugMode() as plain:
        step()
    with CommDebugMode() as recorded, record(fm, path) as run:
        step()
    for mode in (plain, recorded):
        counts.append({str(k).split(".")[-1]: v for k, v in mode.get_comm_counts().items()})
    return run, *counts, report.as_dicts(), [str(report)] if not report.ok else []


@pytest.mark.parametrize("engine", ENGINES)
def test_sharded_equals_one_process(engine: str, tmp_path: Path) -> None:
    """Record and check agree with one process; of values nothing is gathered, only measures are reduced."""
    alone = _one_process()
    run, plain, recorded, rows, problems = run_world(2, _recorded, engine, tmp_path / "run")[0]
    assert not problems, problems
    found = diff(alone, tmp_path / "run")
    print(f"check.record, {engine}: {sum(r.same for r in found.rows)} exact of {len(alone)}")
    assert found.same, found
    assert list(run) == list(alone) == list(Run.load(tmp_path / "run.json"))  # the same order, too
    extra = {kind: n - plain.get(kind, 0) for kind, n in recorded.items() if n != plain.get(kind, 0)}
    assert all("reduce" in kind and "scatter" not in kind for kind in extra), (plain, recorded)
    assert sum(extra.values()) < 24  # and not one a site
    assert {row["check"] for row in rows} >= {"parity", "gradient parity", "finite", "replicas equal"}


@pytest.mark.parametrize("engine", ["2d_sp", "hsdp"])
def test_two_axes(engine: str, tmp_path: Path) -> None:
    alone = _one_process()
    *_, problems = run_world(4, _recorded, engine, tmp_path / "run")[0]
    assert not problems, problems
    found = diff(alone, tmp_path / "run")
    print(f"check.record, {engine}: {sum(r.same for r in found.rows)} exact of {len(alone)}")
    assert found.same, found


def _uneven(sizes: list[int]) -> tuple[Run, list[dict[str, Any]]]:
    fm = FlexModel(engines.place("ddp", models.net()).model)
    mine = models.tokens(sum(sizes)).split(sizes)[dist.get_rank()]
    with record(fm, grad=False) as run:
        fm(mine)
    return run, fm.check(mine, grad=False).as_dicts()


def test_batches_of_unequal_size() -> None:
    """Those of the sizes that torch itself gives are measured; others are refused by name, and no check passes."""
    fm = FlexModel(models.net())
    with record(fm, grad=False) as alone:
        fm(models.tokens(3))
    run, rows = run_world(2, _uneven, [2, 1])[0]
    assert diff(alone, run).same and {row["status"] for row in rows} == {"ok"}, rows
    run, rows = run_world(2, _uneven, [3, 1])[0]
    assert not run.measured and set(run.refused) == {str(place) for place in alone}
    assert [row["status"] for row in rows if row["check"] == "parity"] == ["not run"]


def _captured() -> tuple[Run, float]:
    from flex_model.check.recording import of_captured

    fm = FlexModel(engines.place("ddp", models.net()).model)
    part = models.tokens().chunk(2)[dist.get_rank()]
    with fm.capture("layers.*", deliver="local", grad=True) as acts, fm.capture("layers.*", grad=True) as whole:
        engines.loss(fm(part)).backward()
    gradient = acts.grad("layers.0")
    assert isinstance(gradient, DTensor)
    return of_captured(acts), float((gradient.full_tensor() - whole.grad("layers.0")).norm())


def test_captures_and_local_gradients() -> None:
    """Captures are runs too, local ones as whole ones; a local gradient is the part of the whole one."""
    fm = FlexModel(models.net())
    with fm.capture("layers.*", grad=True) as acts:
        engines.loss(fm(models.tokens())).backward()
    run, apart = run_world(2, _captured)[0]
    assert diff(acts, run).same
    assert apart == 0.0


def test_dtypes_and_files(tmp_path: Path) -> None:
    single, half = _one_process(path=tmp_path / "a"), _one_process(models.net().bfloat16(), path=tmp_path / "b")
    found = diff(tmp_path / "a", tmp_path / "b.json")
    assert found.first is None and {r.tolerance for r in found.rows} == {4e-2}, found
    assert not diff(single, half, rtol=1e-5).same
    assert "layers.1.mlp.act" in str(single) and "mean" in str(single)


def test_projections_tell_the_distance() -> None:
    from flex_model.check.measure import measure

    a = torch.randn(8, 30, 16)
    for size in (1e-1, 1e-3, 1e-6):
        b = a + size * torch.randn_like(a)
        one, other = measure([a, b])
        apart = torch.tensor(one.projections) - torch.tensor(other.projections)
        assert 0.5 < float(apart.square().mean().sqrt() / (b - a).norm()) < 2


def test_a_file_that_is_no_run(tmp_path: Path) -> None:
    run = _one_process()
    table = run.save(tmp_path / "run")
    content = json.loads(table.read_text())
    for change in (
        {"flex_model.run": 2},
        {"rows": content["rows"][1:]},
        {"rows": [{**content["rows"][0], "what": "../x"}, *content["rows"][1:]]},
        {"about": 3},
    ):
        table.write_text(json.dumps({**content, **change}))
        with pytest.raises(RunError, match="no saved run"):
            Run.load(table)
    content["rows"][0]["name"] = "../../etc/passwd"  # only a name
    table.write_text(json.dumps(content))
    assert "../../etc/passwd" in {place.name for place in Run.load(table)}
    (tmp_path / "run.safetensors").write_bytes(b"\x80\x04N.")  # a pickle
    with pytest.raises(RunError, match="no saved run"):
        Run.load(table)
    with pytest.raises(RunError, match="no place in common"):
        diff(run, Run())


# -- a fault is named where it begins --------------------------------------------------------------------------
def test_a_wrong_weight() -> None:
    wrong = models.net()
    with torch.no_grad():
        wrong.layers[1].mlp.down.weight[0, 0] += 1e-2
    found = diff(_one_process(), _one_process(wrong))
    assert found.first is not None and found.first.place == Place("layers.1.mlp.down", "value")
    assert found.first_gradient is not None and found.first_gradient.place.name == "head"
    assert "First to differ in the forward: layers.1.mlp.down" in str(found)


class _WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 1.001


class _Gelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(_WrongBackward.apply(x))


def test_a_wrong_backward() -> None:
    wrong = models.net()
    wrong.layers[1].mlp.act = _Gelu()
    found = diff(_one_process(), _one_process(wrong))
    assert found.first is None
    assert found.first_gradient is not None
    assert found.first_gradient.place == Place("layers.1.mlp.act", "gradient of the input")


def _faulty(fault: str) -> tuple[bool, list[dict[str, Any]]]:
    placed = engines.place("tp", models.net())
    fm, layer = FlexModel(placed.model), placed.model.layers[1]
    reference = models.net()
    one = dist.get_rank() == 1
    with torch.no_grad():
        if fault == "nan":
            layer.mlp.down.weight.to_local()[0] = float("nan")
        elif fault == "weight":
            reference.layers[1].mlp.up.weight[3, 2] += 0.1
        elif fault == "replica" and one:
            layer.norm.weight[0] += 0.1
        elif fault == "replica of known layout":
            fm.check(models.tokens(), reference=False).raise_if_failed()
            layer.norm.weight[0] += 1e-5 * one
        elif fault == "trainable":
            fm.register_trainable_module("probe", nn.Linear(2, 2))
            fm.trainable_modules["probe"].bias[0] += one
    report = fm.check(models.tokens(), reference=reference)
    if not report.ok:
        with pytest.raises(CheckFailed, match="fail"):
            report.raise_if_failed()
    return report.ok, report.as_dicts()


FAULTS = {
    "none": {},
    "nan": {"finite": "layers.1.mlp.down", "parity": "layers.1.mlp.down"},
    "weight": {"parity": "layers.1.mlp.up"},
    "replica": {"parameters equal": "layers.1.norm.weight", "replicas equal": "layers.1.norm"},
    "replica of known layout": {"parameters equal": "layers.1.norm.weight", "replicas equal": "layers.1.norm"},
    "trainable": {"trainable modules equal": "probe.bias"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault: str) -> None:
    named = FAULTS[fault]
    ranks = run_world(2, _faulty, fault)
    assert ranks[0] == ranks[1]
    ok, rows = ranks[0]
    assert ok is not bool(named)
    failed = {}
    for row in rows:
        if row["status"] == "fail":
            failed.setdefault(row["check"], row["where"])
    assert {check: failed.get(check) for check in named} == named, rows
    if not named:
        assert not failed and {r["status"] for r in rows} == {"ok"}


def test_no_reference_is_no_pass() -> None:
    fm = FlexModel(models.net())
    report = fm.check(models.tokens())
    assert not report.ok and [r.status for r in report.of("parity")] == ["not run"]
    assert fm.check(models.tokens(), reference=False).ok
    assert fm.check(models.tokens(), reference=models.net).ok
    broken = fm.check(models.tokens(), reference=lambda: nn.Linear(3, 3))
    assert "does not run on this batch" in broken.of("parity")[0].found


def test_nothing_is_left_behind() -> None:
    model = models.net().train()
    model.layers[0].eval()
    fm = FlexModel(model)
    engines.loss(fm(models.tokens())).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    modes, state, hooks = [m.training for m in model.modules()], torch.get_rng_state(), fm.hooks()
    assert fm.check(models.tokens(), reference=copy.deepcopy(model)).ok
    assert all(torch.equal(p.grad, grads[n]) for n, p in model.named_parameters())
    assert modes == [m.training for m in model.modules()] and fm.hooks() == hooks
    assert torch.equal(state, torch.get_rng_state())


def test_places_stand_for_their_modules() -> None:
    fm = FlexModel(models.make("llama"))
    batch = models.inputs("llama")
    for patterns in (fm.at("z", 1), [fm.at("z", 1), "lm_head"]):
        with record(fm, patterns=patterns, grad=False) as run, torch.no_grad():
            fm(**batch)
        names = {place.name for place in run}
        assert "model.layers.1.self_attn.o_proj" in names and ("lm_head" in names) == isinstance(patterns, list)
    assert fm.check(batch, patterns=fm.at("mlp_out"), reference=models.make("llama"), loss=lambda o: o.logits.mean()).ok


def test_frozen_models_and_own_losses() -> None:
    model = models.net().requires_grad_(False)
    report = FlexModel(model).check(models.tokens(), reference=models.net().requires_grad_(False))
    assert report.ok and report.of("gradient parity")[0].status == "ok"
    report = FlexModel(models.net()).check((models.tokens(),), reference=models.net(), loss=lambda out: out.mean())
    assert report.ok, report
