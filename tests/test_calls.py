"""Who calls, and when: engines applied late, unequal loops, recomputation, attached captures, random edits."""

from __future__ import annotations

import copy
from typing import Any

import engines
import models
import parity
import pytest
import torch
import torch.distributed as dist
from oracle import relative_error
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint
from worlds import run_world

from flex_model import FlexModel, HookFunction

SITE = "layers.0.mlp.act"


def mix(x: Tensor) -> Tensor:
    return torch.tanh(x - x.mean(0, keepdim=True) + x.flip(-1))


def _late(engine: str) -> list[Any]:
    """The engine comes after FlexModel and after a first plain forward, as a trainer would bring it."""
    plain = models.net()
    seen: dict[str, Tensor] = {}
    plain.get_submodule(SITE).register_forward_hook(lambda m, a, o: seen.__setitem__("act", o.detach()) or mix(o))
    full = models.tokens()
    engines.loss(plain(full)).backward()
    output: dict[str, list[Tensor]] = {}
    fm = FlexModel(models.net(), output, deliver="all")
    fm.register_forward_hook(HookFunction(SITE, editing_function=mix))
    fm(full)
    before = len(output[SITE])
    world, rank = dist.get_world_size(), dist.get_rank()
    runner: nn.Module = fm
    if engine == "ddp":
        runner = nn.parallel.DistributedDataParallel(fm)
    elif engine == "fsdp2":
        fully_shard(fm.module.layers[0])
        fully_shard(fm)
    else:
        parallelize_module(fm.module, init_device_mesh("cpu", (world,)), engines.plan("tp"))
    mine = full if engine == "tp" else full.chunk(world)[rank]
    parameters = dict(fm.named_parameters())
    engines.loss(runner(mine)).backward()
    return [before, relative_error(output[SITE][-1], seen["act"]) < 1e-5, parity.wrong_gradients(fm, plain, parameters)]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "tp"])
def test_an_engine_applied_late_is_noticed(engine: str) -> None:
    assert run_world(2, _late, engine) == [[1, True, []]] * 2


def _unequal(steps: tuple[int, int]) -> list[Any]:
    """Evaluation without gradients under DDP: ranks have different numbers of batches."""
    fm = FlexModel(nn.parallel.DistributedDataParallel(models.net()))
    rank = dist.get_rank()
    plain = models.net()
    with torch.no_grad(), fm.capture("layers.1") as acts:
        for step in range(steps[rank]):
            fm((models.tokens(2) + step + 7 * rank) % 32)
    calls = acts.calls("layers.1")
    seen: list[Tensor] = []
    plain.layers[1].register_forward_hook(lambda m, a, o: seen.append(o))
    ok = []
    with torch.no_grad():
        for step in range(max(steps)):
            there = [(models.tokens(2) + step + 7 * r) % 32 for r in range(2) if step < steps[r]]
            plain(torch.cat(there))
            ok.append(relative_error(calls[step], seen[-1]) < 1e-5)
    return [len(calls), all(ok)]


@pytest.mark.parametrize("steps", [(3, 3), (3, 1), (1, 4)])
def test_loops_of_unequal_length(steps: tuple[int, int]) -> None:
    assert run_world(2, _unequal, steps) == [[max(steps), True]] * 2


class Checkpointed(models.Net):
    reentrant = False

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.head(self.norm(x))


def _checkpointed(engine: str, reentrant: bool) -> list[Any]:
    torch.manual_seed(0)
    model = Checkpointed()
    model.reentrant = reentrant
    plain = models.net()
    plain.get_submodule(SITE).register_forward_hook(lambda m, a, o: mix(o))
    full = models.tokens()
    engines.loss(plain(full)).backward()
    placed = engines.place(engine, model)
    fm = FlexModel(placed.model)
    runs = 0

    def edit(x: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        return mix(x)

    parameters = dict(fm.named_parameters())
    with fm.edit(SITE, edit), fm.capture("layers.0.mlp.up", grad=True) as acts:
        engines.local_loss(engine, fm(placed.mine(full))).backward()
    return [runs, len(acts.calls("layers.0.mlp.up")), parity.wrong_gradients(fm, plain, parameters)]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "tp"])
def test_checkpointing(engine: str, reentrant: bool) -> None:
    assert run_world(2, _checkpointed, engine, reentrant) == [[2, 1, []]] * 2


def _attached(engine: str, frozen: bool) -> list[Any]:
    """The gradient of a metric by a captured value, on every rank; and by ``grad=True``."""
    plain = models.net()
    placed = engines.place(engine, copy.deepcopy(plain))
    seen: dict[str, Tensor] = {}

    def keep(m: nn.Module, a: Any, o: Tensor) -> Tensor:
        seen["act"] = o.detach().requires_grad_() if frozen else o
        return seen["act"].clone()

    plain.get_submodule(SITE).register_forward_hook(keep)
    full = models.tokens()
    (want,) = torch.autograd.grad(engines.loss(plain(full)), seen["act"])
    fm = FlexModel(placed.model)
    if frozen:
        fm.requires_grad_(False)
        with fm.capture(SITE, grad=True) as acts:
            engines.local_loss(engine, fm(placed.mine(full))).backward()
        return [relative_error(acts.grad(SITE), want) < 1e-5]
    with fm.capture(SITE, detach=False) as acts:
        loss = engines.local_loss(engine, fm(placed.mine(full)))
    (got,) = torch.autograd.grad(loss, acts[SITE])
    return [relative_error(got, want) < 1e-5, relative_error(acts[SITE], seen["act"]) < 1e-5]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("engine", ["ddp", "fsdp1", "fsdp2", "tp", "sp", "tp_dtensors"])
def test_gradient_of_a_captured_value(engine: str, frozen: bool) -> None:
    assert run_world(2, _attached, engine, frozen) == [[True] * (1 if frozen else 2)] * 2


def _random(engine: str) -> list[Any]:
    """Ranks seeded differently draw the same numbers as one process, and their own state is untouched."""

    def noise(x: Tensor) -> Tensor:
        return x + torch.randn_like(x)

    full = models.tokens()
    alone = FlexModel(models.net())
    alone.seed = 3
    with alone.edit(SITE, noise, random=True):
        want = alone(full)
    torch.manual_seed(100 + dist.get_rank())
    state = torch.get_rng_state()
    placed = engines.place(engine, models.net())
    torch.set_rng_state(state)
    fm = FlexModel(placed.model)
    fm.seed = 3
    with fm.edit(SITE, noise, random=True):
        got = fm.full_output(fm(placed.mine(full)))
    return [relative_error(engines.whole(got), want) < 1e-5, torch.equal(torch.get_rng_state(), state)]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "tp"])
def test_random_edits(engine: str) -> None:
    assert run_world(2, _random, engine) == [[True, True]] * 2


def test_check_mode_finds_an_edit_that_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    from flex_model.errors import EditError

    monkeypatch.setenv("FLEX_MODEL_CHECK", "1")
    fm = FlexModel(models.net())
    with (
        pytest.raises(EditError, match=r"layers.0.mlp.act \(forward\).*random=True"),
        fm.edit(SITE, lambda x: x + torch.randn_like(x)),
    ):
        fm(models.tokens())


def _silently_lost() -> list[str]:
    from flex_model.errors import EditError

    fm = FlexModel(engines.place("tp", models.net()).model)
    said = []

    def slices(x: Tensor) -> Tensor:
        x[..., 2:10] *= 2
        return x

    def rows(x: Tensor) -> Tensor:
        x[0] = x[1]
        return x

    for edit in (slices, rows):
        try:
            with fm.edit(SITE, edit, run="sharded"):
                fm(models.tokens())
            said.append("nothing")
        except EditError as error:
            said.append("in place through a view" if "in place through a view" in str(error) else str(error)[:200])
    return said


def test_sharded_writes_are_never_lost() -> None:
    assert run_world(2, _silently_lost) == [["in place through a view"] * 2] * 2


def _whole() -> list[Any]:
    full = models.tokens(batch=5)
    mine = full[:3] if dist.get_rank() == 0 else full[3:]
    fm = FlexModel(engines.place("fsdp2", models.net()).model)
    output = fm(mine)
    labels = fm.full_batch({"labels": mine, "weights": mine.float()})
    want = models.net()(full)
    return [relative_error(fm.full_output(output), want) < 1e-5, torch.equal(labels["labels"], full)]


def test_full_output_and_full_batch() -> None:
    assert run_world(2, _whole) == [[True, True]] * 2


class Routed(nn.Module):
    """Experts of their own modules: one runs only where a sample asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i, expert in enumerate(self.experts):
            chosen = x[:, 0] > 0 if i == 0 else (x[:, 0] <= 0 if i == 1 else x[:, 0] > 1e9)
            if bool(chosen.any()):
                x = torch.where(chosen[:, None], expert(x), x)
        return x


def _routed(grad: bool) -> list[Any]:
    torch.manual_seed(0)
    model = Routed()
    with torch.no_grad():
        model.first.weight.copy_(torch.eye(8))
        model.first.bias.zero_()
    fm = FlexModel(nn.parallel.DistributedDataParallel(model, find_unused_parameters=True))
    sign = 1.0 if dist.get_rank() == 0 else -1.0
    out = []
    for _ in range(2):  # the first call finds layouts, the second has them
        with torch.set_grad_enabled(grad), fm.capture("first", "experts.*") as acts:
            fm(torch.full((2, 8), sign))
        out.append([tuple(acts["first"].shape), sorted(acts.refused)])
    return out


@pytest.mark.parametrize("grad", [True, False])
def test_modules_that_run_on_some_ranks_only_are_refused_by_name(grad: bool) -> None:
    for rank, (first, second) in enumerate(run_world(2, _routed, grad)):
        assert first == [(4, 8), ["experts.0", "experts.1"]]
        assert second == [(4, 8), [f"experts.{rank}"]]  # known by now, where it runs
