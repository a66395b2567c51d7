"""torch.distributed.pipelining: every module of every stage, under every schedule, equals the model on one process."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

import models
import parity
import pytest
import torch
import torch.distributed as dist
from conftest import REGISTER, torch_hook
from oracle import Count, plain_hooks, relative_error
from pipelines import SCHEDULES, SINGLE, Pipe, Traffic, loss, step
from torch import Tensor, nn
from worlds import run_world

from flex_model import FlexModel, HookFunction, edits
from flex_model.errors import DeliveryError, EditError, LayoutError, NameNotFoundError

LAYERS, BATCH = 4, 8


def tokens() -> Tensor:
    return models.tokens(batch=BATCH)


# -- every module ----------------------------------------------------------------------------------------------
def _parity(schedule: str, scale_grads: bool) -> Count:
    plain = models.net(layers=LAYERS)
    pipe = Pipe(plain, schedule, scale_grads=scale_grads)
    run, fm = pipe.schedule(), FlexModel(pipe.module)
    # the mean over the batch is the mean of the microbatches' means; undivided, it is their sum
    times = 1 if scale_grads else pipe.microbatches
    want = parity.whole_step(plain, lambda m: loss(m(tokens())) * times)
    count, _ = parity.compare_step(fm, want, lambda: step(run, tokens()))
    for name, parameter in fm.named_parameters():
        assert relative_error(parameter.grad, plain.get_parameter(name).grad) < 1e-5, name
    return count


@pytest.mark.parametrize("scale_grads", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_module(schedule: str, scale_grads: bool) -> None:
    for count in run_world(2, _parity, schedule, scale_grads):
        print(f"pipeline of 2, {schedule}, {'mean' if scale_grads else 'sum'} of microbatches: {count}")
        assert not count.wrong and not count.refused and count.tried == 110 + 20  # modules and parameters


def _evaluation() -> list[str]:
    plain, bad = models.net(layers=LAYERS), []
    pipe = Pipe(plain, "1f1b")
    run, fm = pipe.schedule(), FlexModel(pipe.module)
    with torch.no_grad():
        want = plain_hooks(plain, lambda m: m(tokens()), backward=False)
    for _ in range(2):
        with fm.capture("**") as acts:
            out = step(run, tokens(), train=False)
        bad += [n for n in acts if relative_error(acts[n], want[n, "forward", 0][0]) > 1e-5]
        assert len(acts) == len([n for n in fm.wrapped_module_names if (n, "forward", 0) in want]) - 1
    assert relative_error(fm.full_output(out), plain(tokens())) < 1e-5
    for name, parameter in plain.named_parameters():
        assert torch.equal(fm.get_module_parameter(name), parameter)
    return bad


def test_evaluation_and_what_is_whole() -> None:
    assert run_world(2, _evaluation) == [[], []]


# -- edits, trainable modules, registered hooks ------------------------------------------------------------------
def mix(x: Tensor) -> Tensor:
    return torch.tanh(x - x.mean(-1, keepdim=True) - 0.5 * x.mean(0, keepdim=True)) * 1.5


def mix_gradient(g: Tensor) -> Tensor:
    return g * 2 - g.mean(0, keepdim=True) + g.flip(-1)


def plain_step(plain: nn.Module, microbatches: int, divide: int) -> list[Tensor]:
    """The oracle's step: an edit sees one microbatch."""
    outputs = []
    for part in tokens().chunk(microbatches):
        outputs.append(plain(part))
        loss(outputs[-1]).backward()
    for parameter in plain.parameters():
        if parameter.grad is not None:
            parameter.grad /= divide
    return outputs


CASES = (
    ("layers.0.mlp.act", "forward"),
    ("layers.3.mlp.act", "forward"),
    ("layers.2", "forward_pre"),
    ("layers.1.mlp", "full_backward"),
    ("layers.3.mlp.down", "full_backward_pre"),
    ("emb", "forward"),
    ("head", "forward"),
    ("layers.1.mlp.up.weight", "tensor"),
)


def _edits(schedule: str, scale_grads: bool, run: str, wrapped: bool) -> list[str]:
    bad = []
    for name, kind in CASES:
        plain = models.net(layers=LAYERS)
        pipe = Pipe(plain, schedule, scale_grads=scale_grads)
        fm = FlexModel(pipe.module)
        schedule_ = pipe.schedule([fm] if wrapped else None)
        fn = mix if kind.startswith("forward") else mix_gradient
        torch_hook(plain, name, kind, fn)
        getattr(fm, REGISTER[kind])(HookFunction(name, editing_function=fn, run=run))
        output = step(schedule_, tokens())
        want = plain_step(plain, pipe.microbatches, pipe.microbatches if scale_grads else 1)
        output = fm.full_output(output)
        errors = {n: relative_error(p.grad, plain.get_parameter(n).grad) for n, p in fm.named_parameters()}
        errors["output"] = relative_error(output, torch.cat(want))
        bad += [f"{name} {kind} {run}: {n} off by {e:.2g}" for n, e in errors.items() if not e < 1e-5]
        assert dist.get_rank() or len(fm.output_ptr[name]) == 1
    return bad


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_edits(schedule: str) -> None:
    for scale_grads, run in ((True, "every_rank"), (False, "one_rank")):  # run="sharded" is in test_meshes
        for bad in run_world(2, _edits, schedule, scale_grads, run, schedule in SINGLE):
            assert not bad
    print(f"edits under {schedule}: {2 * len(CASES)} exact of {2 * len(CASES)}")


def _trainable(schedule: str, scale_grads: bool, wrapped: bool) -> None:
    """One module, used on both stages; two steps, so that gradients accumulate; then an optimizer step."""
    torch.manual_seed(5)
    probe = nn.Linear(8, 8)
    mine, plain = copy.deepcopy(probe), models.net(layers=LAYERS)
    pipe = Pipe(plain, schedule, scale_grads=scale_grads)
    fm = FlexModel(pipe.module)
    fm.register_trainable_module("probe", mine)
    run = pipe.schedule([fm] if wrapped else None)
    for name in ("layers.0.mlp", "layers.1", "layers.3.mlp"):
        torch_hook(plain, name, "forward", lambda x: mix(probe(x)))
        edit = lambda module, x, save_ctx, modules: mix(modules["probe"](x))  # noqa: E731
        fm.register_forward_hook(HookFunction(name, editing_function=edit, capture=False))
    divide = pipe.microbatches if scale_grads else 1
    total: list[Tensor] = [torch.zeros_like(p) for p in probe.parameters()]
    for _ in range(2):
        step(run, tokens())
        probe.zero_grad()
        plain_step(plain, pipe.microbatches, 1)
        total = [t + p.grad / divide for t, p in zip(total, probe.parameters(), strict=True)]
    if not wrapped:  # torch divides what was accumulated before as well, if the stage is the FlexModel
        for p, want in zip(mine.parameters(), total, strict=True):
            assert relative_error(p.grad, want) < 1e-5
    torch.optim.AdamW(fm.trainable_modules.parameters(), lr=0.1).step()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [p.detach() for p in mine.parameters()])
    assert all(torch.equal(a, b) for theirs in everyone for a, b in zip(theirs, everyone[0], strict=True))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero_bubble"])
@pytest.mark.parametrize("scale_grads", [True, False])
def test_trainable_modules_over_stages(schedule: str, scale_grads: bool) -> None:
    run_world(2, _trainable, schedule, scale_grads, False)


def _trainable_in_stage() -> None:
    _trainable("1f1b", True, True)


def test_flexmodel_as_the_stage_itself() -> None:
    run_world(2, _trainable_in_stage)


def _checkpoint(schedule: str, path: str) -> None:
    """torch.distributed.checkpoint: the plain model's keys of all stages, and the trainable modules."""
    import torch.distributed.checkpoint as dcp

    def fresh(seed: int) -> FlexModel:
        torch.manual_seed(seed)
        whole = models.Net(layers=LAYERS)
        pipe = Pipe(whole, schedule)
        fm = FlexModel(pipe.module)
        kept.append((whole, pipe.schedule()))
        fm.register_trainable_module("probe", nn.Linear(8, 8))
        return fm

    kept: list[Any] = []
    saved, loaded = fresh(1), fresh(2)
    dcp.save(saved.state_dict(), checkpoint_id=path)
    keys = set(dcp.FileSystemReader(path).read_metadata().state_dict_metadata)
    assert keys == {*kept[0][0].state_dict(), "trainable_modules.probe.weight", "trainable_modules.probe.bias"}
    state = loaded.state_dict()
    dcp.load(state, checkpoint_id=path)
    loaded.load_state_dict(state)
    mine, theirs = dict(loaded.named_parameters()), dict(saved.named_parameters())
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_checkpoints(schedule: str, tmp_path: Any) -> None:
    run_world(2, _checkpoint, schedule, str(tmp_path / "checkpoint"))


# -- save_ctx over stages ------------------------------------------------------------------------------------------
def _save_ctx(schedule: str) -> None:
    plain, seen, backward = models.net(layers=LAYERS), [], []
    pipe = Pipe(plain, schedule)
    fm, run = FlexModel(pipe.module), pipe.schedule()

    def write(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any, call: Any) -> None:
        save_ctx.early, save_ctx.number = x.detach(), call.microbatch
        save_ctx.graph = x

    def read(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any, call: Any) -> Tensor:
        seen.append((call.microbatch, save_ctx.number, save_ctx.early))
        with pytest.raises(AttributeError, match="no hook that ran so far has written it"):
            _ = save_ctx.never
        with pytest.raises(EditError, match=r"written on stage 0 with a graph.*detach"):
            _ = save_ctx.graph
        save_ctx.late = float(x.sum())
        return x + save_ctx.early

    def read_backward(module: nn.Module, g: Tensor, save_ctx: Any, modules: Any, call: Any) -> None:
        backward.append((call.microbatch, save_ctx.late, save_ctx.of_gradient, save_ctx.number))

    def write_backward(module: nn.Module, g: Tensor, save_ctx: Any, modules: Any) -> None:
        save_ctx.of_gradient = float(g.sum())

    fm.register_forward_hook(HookFunction("emb", editing_function=write))
    fm.register_forward_hook(HookFunction("layers.3", editing_function=read))
    fm.register_full_backward_hook(HookFunction("head", editing_function=write_backward))
    fm.register_full_backward_hook(HookFunction("layers.0.mlp", editing_function=read_backward))
    step(run, tokens())

    kept: list[Tensor] = []
    late: list[float] = []
    grads: list[float] = []
    plain.emb.register_forward_hook(lambda m, a, o: kept.append(o.detach()))
    plain.layers[3].register_forward_hook(lambda m, a, o: (late.append(float(o.sum())), o + kept[-1])[1])
    plain.head.register_full_backward_hook(lambda m, gi, go: grads.append(float(gi[0].sum())))
    plain_step(plain, pipe.microbatches, pipe.microbatches)
    if dist.get_rank() == dist.get_world_size() - 1:
        assert [(a, b) for a, b, _ in seen] == [(k, k) for k in range(pipe.microbatches)]
        assert all(relative_error(x, y) < 1e-5 for (_, _, x), y in zip(seen, kept, strict=True))
    if dist.get_rank() == 0:
        assert [(k, n) for k, _, _, n in backward] == [(k, k) for k in range(pipe.microbatches)]
        torch.testing.assert_close([b[1] for b in backward], late, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close([b[2] for b in backward], grads, rtol=1e-5, atol=1e-5)
    assert fm.save_ctx.number == pipe.microbatches - 1  # after the step: the last microbatch's
    for name, parameter in fm.named_parameters():
        assert relative_error(parameter.grad, plain.get_parameter(name).grad) < 1e-5, name


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved"])
def test_save_ctx_over_stages(schedule: str) -> None:
    run_world(2, _save_ctx, schedule)


# -- what can go wrong ---------------------------------------------------------------------------------------------
def _failing_edit(preset: bool) -> None:
    pipe = Pipe(models.net(layers=LAYERS), "1f1b")
    fm = FlexModel(pipe.module)
    run = pipe.schedule()

    def fail(x: Tensor) -> Tensor:
        raise ValueError("no such feature")

    edit, words = (edits.add(torch.randn(9)), "size of tensor") if preset else (fail, "no such feature")
    with fm.edit("layers.3.mlp", edit), pytest.raises(EditError, match=rf"layers.3.mlp.*rank 1.*{words}"):
        step(run, tokens())
    with fm.capture("emb", "head") as acts:  # and the next step is as if nothing had been
        step(run, tokens())
    assert acts["emb"].shape == (BATCH, 6, 8) and acts["head"].shape == (BATCH, 6, 32)


@pytest.mark.parametrize("preset", [False, True])
def test_a_failing_edit_is_everybodys(preset: bool) -> None:
    """Also one that would fail on all ranks alike: the other stage does not make it."""
    run_world(2, _failing_edit, preset)


class Sliced(nn.Module):
    """A stage as people cut it first: the layers of each are counted from 0."""

    def __init__(self, whole: models.Net, low: int, high: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(whole.layers[i]) for i in range(low, high))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _collisions() -> None:
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    rank, plain = dist.get_rank(), models.net(layers=3)
    part = Sliced(plain, 0, 1) if rank == 0 else Sliced(plain, 1, 3)
    run = ScheduleGPipe(PipelineStage(part, rank, 2, torch.device("cpu")), 2)
    fm = FlexModel(part)
    with (
        pytest.raises(NameNotFoundError, match=r"stages 0 and 1 both have 'layers.0.*names=") as told,
        fm.capture("**"),
    ):
        pass
    names = {"layers.0": "layers.0"} if rank == 0 else {"layers.0": "layers.1", "layers.1": "layers.2"}
    assert f"names={names}" in str(told.value)
    fm = FlexModel(part, names=names)
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(2))
    with fm.capture("layers.*") as acts:
        step(run, x, train=False)
    for i, layer in enumerate(plain.layers):
        x = layer(x)
        assert relative_error(acts[f"layers.{i}"], x) < 1e-5
    assert list(acts) == ["layers.0", "layers.1", "layers.2"]


def test_slices_with_the_same_names_are_told_so_and_mapped() -> None:
    run_world(2, _collisions)


class Summary(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(0)


def _no_batch() -> None:
    pipe = Pipe(models.net(layers=LAYERS), "gpipe")
    for part in pipe.parts:
        part.summary = Summary()
        part.register_forward_hook(lambda m, a, o: (m.summary(o), o)[1])
    fm, run = FlexModel(pipe.module), pipe.schedule()
    with fm.capture("summary", "layers.*") as acts:
        step(run, tokens())
    with pytest.raises(LayoutError, match=r"summary.*microbatches cannot be put together"):
        _ = acts["summary"]
    assert list(acts.refused) == ["summary"] and len(acts) == LAYERS


def test_what_cannot_be_put_together_is_refused_on_every_rank() -> None:
    run_world(2, _no_batch)


def _select() -> None:
    plain, batch = models.net(layers=LAYERS), tokens()
    pipe = Pipe(plain, "1f1b")
    fm, run = FlexModel(pipe.module), pipe.schedule()
    want = plain_hooks(plain, lambda m: loss(m(batch)))
    for select in ((slice(None), -1), slice(1, 6), (0, slice(2, 4)), lambda x: x[..., :3], lambda x: x.mean(0)):
        take = select if callable(select) else lambda x, s=select: x[s]
        with fm.capture("layers.0.mlp", "layers.3", select=select) as acts:
            step(run, batch)
        for name in acts:
            assert relative_error(acts[name], take(want[name, "forward", 0][0])) < 1e-5
        assert len(acts) == 2


def test_selections_are_of_the_whole_batch() -> None:
    run_world(2, _select)


def _late() -> None:
    """Stages made after the hooks, and a model called by hand."""
    plain = models.net(layers=LAYERS)
    pipe = Pipe(plain, "gpipe")
    fm = FlexModel(pipe.module, deliver="all")
    own = "emb" if dist.get_rank() == 0 else "head"
    with pytest.raises(NameNotFoundError):
        fm.register_forward_hook(HookFunction("head" if own == "emb" else "emb"))
    run = pipe.schedule()
    fm.register_forward_hook(HookFunction("emb"))
    fm.register_forward_hook(HookFunction("head"))
    assert {r.fired for r in fm.hooks()} == {0}
    step(run, tokens())
    assert {n: v[0].shape for n, v in fm.output_ptr.items()} == {"emb": (BATCH, 6, 8), "head": (BATCH, 6, 32)}
    assert sum(r.fired for r in fm.hooks()) == pipe.microbatches  # of this rank's hook, and not of shape inference
    assert {"emb", "head", "layers.0.mlp.act", "layers.3"} <= set(fm.wrapped_module_names)
    with fm.capture("emb", "head", deliver="local") as acts:
        step(run, tokens())
    assert list(acts) == [own]
    with pytest.raises(DeliveryError, match="on the ranks of its stage"):
        _ = acts["head" if own == "emb" else "emb"]
    assert fm.restore() is pipe.module
    step(run, tokens())
    assert len(fm.output_ptr["emb"]) == 2


def test_stages_made_late() -> None:
    run_world(2, _late)


def _traffic() -> dict[str, dict[str, int]]:
    pipe = Pipe(models.net(layers=LAYERS), "gpipe")
    fm, run = FlexModel(pipe.module), pipe.schedule()
    step(run, tokens())
    counts = {}
    for label, names, deliver in (
        ("nothing", [], "all"),
        ("main", ["layers.0", "layers.2", "layers.3"], "main"),
        ("all", ["layers.0", "layers.2", "layers.3"], "all"),
    ):
        with ExitStack() as stack:
            if names:
                stack.enter_context(fm.capture(*names, deliver=deliver))
                step(run, tokens())  # finds layouts, exchanges manifests
            with Traffic() as traffic:
                step(run, tokens())
        counts[label] = traffic.counts
    return {label: dict(counts[label] - counts["nothing"]) for label in ("nothing", "main", "all")}


def test_collectives() -> None:
    """A step tells of failures (one exchange) and of what each stage has (one); each stage's values are one message."""
    first, last = run_world(2, _traffic)
    assert first["nothing"] == last["nothing"] == {}
    told = {"allreduce": 1, "_allgather_base": 1}
    assert first["main"] == {**told, "recv": 1} and last["main"] == {**told, "send": 1}
    assert first["all"] == last["all"] == {**told, "broadcast": 2}
