"""Exactly once: a capture, and a side effect of a hook, for each call; an edit again in every recomputation of it."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import engines
import models
import parity
import pytest
import torch
import torch.distributed as dist
from conftest import installed, keep, same_gradients, torch_hook
from oracle import relative_error
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint
from worlds import run_world

from flex_model import FlexModel, HookFunction
from flex_model.errors import FlexModelError

BOTH = pytest.mark.parametrize("reentrant", [False, True])
SITE = "layers.0.mlp"


# -- checkpointing -------------------------------------------------------------------------------------------------
class NestedBlock(models.Block):
    """A block that is checkpointed, and whose MLP is checkpointed in it."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.mlp, self.norm(x), use_reentrant=self.reentrant)


class Nested(models.Net):
    def __init__(self, reentrant: bool, inner: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        for layer in self.layers:
            layer.__class__ = NestedBlock
            layer.reentrant = inner

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.head(self.norm(x))


def nested(reentrant: bool, inner: bool) -> Nested:
    torch.manual_seed(0)
    return Nested(reentrant, inner)


def mixed(x: Tensor) -> Tensor:
    return torch.tanh(x - x.mean(0, keepdim=True) + x.flip(-1))


def _nested(engine: str | None, reentrant: bool, inner: bool) -> list[Any]:
    plain, full, values, grads = models.net(), models.tokens(), [], []
    torch_hook(plain, SITE, "forward", lambda x: (keep(values)(x), mixed(x))[1])
    torch_hook(plain, SITE, "full_backward_pre", keep(grads))
    engines.loss(plain(full)).backward()
    model: nn.Module = nested(reentrant, inner)
    placed = engines.Placed(model) if engine is None else engines.place(engine, model)
    fm, effects = FlexModel(placed.model, {}, deliver="all"), []

    def edit(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
        save_ctx.times = getattr(save_ctx, "times", 0) + 1
        return mixed(x)

    fm.register_full_backward_pre_hook(HookFunction(SITE))
    fm.register_forward_hook(HookFunction(SITE, editing_function=edit, capture=False))
    parameters = dict(fm.named_parameters())
    with fm.capture("layers.*.mlp.up", SITE, grad=True) as acts:
        loss = engines.loss if engine is None else lambda out: engines.local_loss(engine, out)
        loss(fm(placed.mine(full))).backward()
    effects += [len(acts.calls(n)) for n in ("layers.0.mlp.up", "layers.1.mlp.up", SITE)]
    effects += [len(acts.grads(SITE)), len(fm.output_ptr[SITE]), fm.save_ctx.times]
    close = [relative_error(fm.output_ptr[SITE][0], grads[0]) < 1e-5]
    return [effects, close, parity.wrong_gradients(fm, plain, parameters)]


@pytest.mark.parametrize("inner", [False, True])
@BOTH
def test_nested_checkpoints(reentrant: bool, inner: bool) -> None:
    assert _nested(None, reentrant, inner) == [[1] * 6, [True], []]


@pytest.mark.parametrize("inner", [False, True])
@BOTH
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "tp"])
def test_nested_checkpoints_under_engines(engine: str, reentrant: bool, inner: bool) -> None:
    assert run_world(2, _nested, engine, reentrant, inner) == [[[1] * 6, [True], []]] * 2


# -- accumulation --------------------------------------------------------------------------------------------------
def _accumulation(engine: str, steps: int = 3) -> list[Any]:
    """Gradients are reduced in the last step only; each call and each backward is met in every step."""
    plain = models.net()
    batches = [(models.tokens() + i) % 32 for i in range(steps)]
    values, grads = [], []
    torch_hook(plain, SITE, "forward", lambda x: (keep(values)(x), mixed(x))[1])
    torch_hook(plain, "norm", "full_backward_pre", keep(grads))
    for full in batches:
        engines.loss(plain(full)).backward()
    placed = engines.place(engine, models.net())
    fm = FlexModel(placed.model, {}, deliver="all")
    fm.register_forward_hook(HookFunction(SITE, editing_function=mixed))
    fm.register_full_backward_pre_hook(HookFunction("norm"))
    parameters = dict(fm.named_parameters())
    for i, full in enumerate(batches):
        last = i == steps - 1
        if engine == "fsdp2":
            placed.model.set_requires_gradient_sync(last)
        with nullcontext() if last or engine == "fsdp2" else placed.model.no_sync():
            engines.local_loss(engine, fm(placed.mine(full))).backward()
    ok = [
        len(got) == len(want) and all(relative_error(g, w) < 1e-5 for g, w in zip(got, want, strict=True))
        for got, want in ((fm.output_ptr[SITE], values), (fm.output_ptr["norm"], grads))
    ]
    return [ok, [r.fired for r in fm.hooks()], parity.wrong_gradients(fm, plain, parameters)]


@pytest.mark.parametrize("engine", ["ddp", "fsdp1", "fsdp2"])
def test_accumulation_without_reducing(engine: str) -> None:
    assert run_world(2, _accumulation, engine) == [[[True, True], [3, 3], []]] * 2


# -- generate ------------------------------------------------------------------------------------------------------
DECODING = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 8},
    "beam": {"do_sample": False, "num_beams": 3},
    "beam sampling": {"do_sample": True, "num_beams": 2, "top_k": 8},
    "no cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("how", DECODING)
def test_generate(how: str) -> None:
    settings = {"max_new_tokens": 4, "use_cache": True, "pad_token_id": 0, "eos_token_id": None, **DECODING[how]}
    batch, seen, heads, runs = models.inputs("llama", 2, 5), [], [], []
    plain = models.make("llama")
    torch_hook(plain, "model.layers.0.mlp", "forward", lambda x: (keep(seen)(x), x * 1.5)[1])
    torch_hook(plain, "lm_head", "forward", keep(heads))
    torch.manual_seed(3)
    expected = plain.generate(**batch, **settings)
    fm = FlexModel(models.make("llama"), {})
    fm.register_forward_hook(HookFunction("lm_head"))
    torch.manual_seed(3)
    with (
        fm.capture("model.layers.0.mlp") as acts,
        fm.edit("model.layers.0.mlp", lambda x: (runs.append(1), x * 1.5)[1]),
    ):
        assert torch.equal(fm.generate(**batch, **settings), expected)
    assert len(runs) == len(seen) == 4
    assert all(torch.equal(a, b) for a, b in zip(acts.calls("model.layers.0.mlp"), seen, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(fm.output_ptr["lm_head"], heads, strict=True))


def _stopping(engine: str, synced: bool, how: dict[str, Any]) -> list[Any]:
    """Rank 0's sequences end early: what it runs for the others' sake is no call, and has no rows."""
    rank = dist.get_rank()
    batch = models.inputs("llama", 4, 5)
    settings = {"do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": None}
    lengths = (2, 5)
    seen: list[list[Tensor]] = []
    for r in range(2):
        plain, mine = models.make("llama"), []
        torch_hook(plain, "model.norm", "forward", keep(mine))
        plain.generate(**{k: v.chunk(2)[r] for k, v in batch.items()}, **settings, max_new_tokens=lengths[r])
        seen.append(mine)
    model = models.make("llama")
    if engine == "fsdp2":
        for layer in model.model.layers:
            fully_shard(layer)
        model = fully_shard(model)
    fm = FlexModel(DDP(model) if engine == "ddp" else model, {}, deliver="all")
    fm.register_forward_hook(HookFunction("model.layers.1", capture=False, editing_function=lambda x: x * 1.0, **how))
    mine_now = {k: v.chunk(2)[rank] for k, v in batch.items()}
    with fm.capture("model.norm") as acts:
        fm.generate(**mine_now, **settings, max_new_tokens=lengths[rank], synced_gpus=synced)
        got = acts.calls("model.norm") if engine == "fsdp2" else []
    got = got or acts.calls("model.norm")
    want = [torch.cat([s[i] for s in seen if i < len(s)]) for i in range(max(lengths))]
    ok = len(got) == len(want) and all(relative_error(g, w) < 1e-5 for g, w in zip(got, want, strict=True))
    return [ok, [tuple(g.shape) for g in got], [r.fired for r in fm.hooks()]]


CASES = [(e, synced, {"axes": ()}) for e, synced in (("ddp", False), ("ddp", True), ("fsdp2", True))]
CASES += [("ddp", True, {"run": "sharded"}), ("fsdp2", True, {"run": "sharded"})]


def test_a_sharded_edit_tells_its_sizes_and_needs_equal_steps() -> None:
    """A DTensor knows its whole shape: without ``synced_gpus`` the rank that goes on is told that nobody comes."""
    with pytest.raises(AssertionError, match=r"MismatchError: rank 0 comes with 2 hooks .*which rank 1 does not have"):
        run_world(2, _stopping, "ddp", False, {"run": "sharded"})


@pytest.mark.parametrize(("engine", "synced", "how"), CASES)
def test_generate_where_ranks_stop_at_different_steps(engine: str, synced: bool, how: dict[str, Any]) -> None:
    shapes = [(4, 5, 32), (4, 1, 32)] + [(2, 1, 32)] * 3
    assert run_world(2, _stopping, engine, synced, how) == [[True, shapes, [2]], [True, shapes, [5]]]


# -- several wrappers ----------------------------------------------------------------------------------------------
def test_several_models_at_once() -> None:
    plains, fms, seen = [], [], []
    for i in range(3):
        torch.manual_seed(i)
        plain = models.Net()
        wrapped = FlexModel(copy.deepcopy(plain), {})
        wrapped.register_forward_hook(HookFunction(SITE, editing_function=lambda x, i=i: x * (i + 1)))
        seen.append([])
        torch_hook(plain, SITE, "forward", lambda x, i=i: (keep(seen[i])(x), x * (i + 1))[1])
        plains.append(plain), fms.append(wrapped)
    ids = models.tokens()
    sum(p(ids).pow(2).mean() for p in plains).backward()
    sum(f(ids).pow(2).mean() for f in fms).backward()
    for i in range(3):
        assert same_gradients(fms[i].module, plains[i])
        assert [torch.equal(a, b) for a, b in zip(fms[i].output_ptr[SITE], seen[i], strict=True)] == [True]


def _inner_and_outer(engine: str | None) -> list[Any]:
    """A FlexModel of a part of a wrapped model: both have hooks there, and each of them is met once a call."""
    plain, values = models.net(), []
    torch_hook(plain, SITE, "forward", lambda x: (keep(values)(x), x * 2.0)[1])
    torch_hook(plain, SITE, "forward", lambda x: (keep(values)(x), x + 1.0)[1])
    full = models.tokens()
    engines.loss(plain(full)).backward()
    model = models.net()
    placed = engines.Placed(model) if engine is None else engines.place(engine, model)
    outer = FlexModel(placed.model, {}, deliver="all")
    inner = FlexModel(outer._runtime.root.layers[0], {}, deliver="all")
    inner.register_forward_hook(HookFunction("mlp", editing_function=lambda x: x * 2.0))
    inner.register_full_backward_pre_hook(HookFunction("mlp"))
    outer.register_forward_hook(HookFunction(SITE, editing_function=lambda x: x + 1.0))
    parameters = dict(outer.named_parameters())
    loss = engines.loss if engine is None else lambda out: engines.local_loss(engine, out)
    loss(outer(placed.mine(full))).backward()
    got = [inner.output_ptr["mlp"], outer.output_ptr[SITE]]
    ok = [len(g) == 1 and relative_error(g[0], v) < 1e-5 for g, v in zip(got, values, strict=True)]
    key = next(k for k in inner.output_ptr if k != "mlp")
    met = inner.output_ptr[key]
    return [ok, len(met), parity.wrong_gradients(outer, plain, parameters), [r.fired for r in inner.hooks()]]


def test_a_wrapped_part_of_a_wrapped_model() -> None:
    assert _inner_and_outer(None) == [[True, True], 1, [], [1, 1]]


def test_a_wrapped_part_that_takes_the_place_of_the_part() -> None:
    plain, seen = models.net(), []
    torch_hook(plain, SITE, "forward", lambda x: (keep(seen)(x), x * 6.0)[1])
    model = models.net()
    inner = FlexModel(model.layers[0], {})
    model.layers[0] = inner
    outer = FlexModel(model, {})
    assert SITE in outer.wrapped_module_names or "layers.0.module.mlp" in outer.wrapped_module_names
    name = next(n for n in outer.wrapped_module_names if n.endswith("0.mlp") or n.endswith("0.module.mlp"))
    inner.register_forward_hook(HookFunction("mlp", editing_function=lambda x: x * 2.0))
    outer.register_forward_hook(HookFunction(name, editing_function=lambda x: x * 3.0))
    for _ in range(2):
        out = outer(models.tokens())
    want = plain(models.tokens())
    assert torch.allclose(out, want, rtol=1e-5, atol=1e-6)
    assert [torch.equal(v, seen[0]) for v in inner.output_ptr["mlp"]] == [True, True]
    assert [torch.allclose(v, seen[0] * 2.0) for v in outer.output_ptr[name]] == [True, True]
    out.sum().backward()
    want.sum().backward()
    mine, theirs = [p.grad for p in model.parameters()], [p.grad for p in plain.parameters()]
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("caller", [0, 1, 2])
def test_one_model_wrapped_twice(caller: int) -> None:
    """Whoever calls the model, both wrappers' hooks run, in the order in which they were put on."""
    plain, seen = models.net(), []
    for f in (2.0, 3.0):
        torch_hook(plain, SITE, "forward", lambda x, f=f: (keep(seen)(x), x * f)[1])
    model = models.net()
    fms = [FlexModel(model, {}) for _ in range(2)]
    for fm, f in zip(fms, (2.0, 3.0), strict=True):
        fm.register_forward_hook(HookFunction(SITE, editing_function=lambda x, f=f: x * f))
    run = (*fms, model)[caller]
    plain(models.tokens()).sum().backward()
    run(models.tokens()).sum().backward()
    assert [torch.equal(fm.output_ptr[SITE][0], v) for fm, v in zip(fms, seen, strict=True)] == [True, True]
    assert [len(fm.output_ptr[SITE]) for fm in fms] == [1, 1] and same_gradients(model, plain)
    fms[0].restore()
    run(models.tokens())
    assert [len(fm.output_ptr[SITE]) for fm in fms] == [1, 2]


# -- hooks that fail, come and go ----------------------------------------------------------------------------------
def _failing(error: type[BaseException], when: str) -> tuple[FlexModel, list[bool]]:
    fm, fails = FlexModel(models.net(), {}), [True]

    def edit(x: Tensor) -> Tensor:
        if fails:
            raise error
        return x * 2.0

    register = fm.register_forward_hook if when == "forward" else fm.register_full_backward_pre_hook
    register(HookFunction(SITE, editing_function=edit))
    fm.register_forward_hook(HookFunction("emb"))
    return fm, fails


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_hook_that_raises_and_is_retried(error: type[BaseException], when: str) -> None:
    fm, fails = _failing(error, when)
    for _ in range(2):
        with pytest.raises(error):
            fm(models.tokens()).sum().backward()
    assert SITE not in fm.output_ptr or when == "backward"
    fm.output_ptr.clear()
    fm.zero_grad()
    fails.clear()
    plain, seen = models.net(), []
    kind = "forward" if when == "forward" else "full_backward_pre"
    torch_hook(plain, SITE, kind, lambda x: (keep(seen)(x), x * 2.0)[1])
    plain(models.tokens()).sum().backward()
    fm(models.tokens()).sum().backward()
    assert [torch.equal(a, b) for a, b in zip(fm.output_ptr[SITE], seen, strict=True)] == [True]
    assert len(fm.output_ptr["emb"]) == 1 and same_gradients(fm.module, plain)


def test_an_interrupt_within_blocks_leaves_nothing_on() -> None:
    fm = FlexModel(models.net())

    def edit(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), fm.capture("**") as acts, fm.edit(SITE, edit):
        fm(models.tokens())
    assert not len(acts) and not fm.hooks() and not installed(fm.module)
    assert fm._runtime.active is None and torch.equal(fm(models.tokens()), models.net()(models.tokens()))


def test_an_interrupt_of_a_call_that_is_not_through_the_wrapper() -> None:
    """Torch runs no hook after it: the next call must not be taken for a part of the one that was left."""
    model = models.net()
    fm, fails = FlexModel(model, {}), [True]

    def edit(x: Tensor) -> Tensor:
        if fails:
            raise KeyboardInterrupt
        return x

    fm.register_forward_hook(HookFunction("emb"))
    fm.register_forward_hook(HookFunction(SITE, editing_function=edit))
    with pytest.raises(KeyboardInterrupt):
        model(models.tokens())
    fails.clear()
    model(models.tokens())
    assert [len(v) for v in fm.output_ptr.values()] == [1, 1]


@pytest.mark.parametrize("block", ["capture", "edit", "groups"])
def test_a_failure_in_a_block_leaves_nothing_registered(block: str) -> None:
    fm = FlexModel(models.net(), {})
    fm.register_forward_hook(HookFunction("head"))
    fm.update_hook_groups("head", "probes")
    before, rows = installed(fm.module), fm.hooks()
    enter = {
        "capture": lambda: fm.capture("layers.*.mlp", grad=True),
        "edit": lambda: fm.edit("layers.*.mlp", lambda x: x * 2),
        "groups": lambda: fm.groups("probes", complement=True),
    }[block]
    for at in ("before", "in", "after"):
        with pytest.raises(ZeroDivisionError), enter():
            if at == "before":
                raise ZeroDivisionError
            loss = fm(models.tokens() if at == "after" else torch.tensor([[1 / 0]])).sum()
            raise ZeroDivisionError(loss)
    assert installed(fm.module) == before
    assert [(r.name, r.enabled) for r in fm.hooks()] == [(r.name, r.enabled) for r in rows]


def test_a_block_that_cannot_be_entered_leaves_nothing() -> None:
    fm = FlexModel(models.net())
    for enter in (
        lambda: fm.capture("layers.*.mlp", "nothing"),
        lambda: fm.edit("nothing", lambda x: x),
        lambda: fm.edit("layers.*.mlp", lambda a, b: a),
        lambda: fm.capture("layers.*.mlp", hook_type="sideways"),
        lambda: fm.groups("nothing"),
    ):
        with pytest.raises(FlexModelError), enter():
            pass
    assert not fm.hooks() and not installed(fm.module)


def test_handles_may_be_removed_twice_and_after_restore() -> None:
    fm = FlexModel(models.net(), {})
    first, second = (fm.register_forward_hook(HookFunction("head")) for _ in range(2))
    first.remove(), first.remove()
    fm(models.tokens())
    assert len(fm.output_ptr["head"]) == 1 and len(fm.hooks()) == 1
    fm.restore(), second.remove(), first.remove(), fm.restore()
    assert not installed(fm.module)
    third = fm.register_forward_hook(HookFunction("head"))
    fm(models.tokens())
    assert len(fm.output_ptr["head"]) == 2
    third.remove()


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_hook_that_removes_another(order: str) -> None:
    """One on a module that has yet to run fires no more in this call; one that has fired keeps what it captured."""
    fm, handles = FlexModel(models.net(), {}), {}
    for name in ("emb", "head"):
        handles[name] = fm.register_forward_hook(HookFunction(name))
    victim = "emb" if order == "after" else "head"
    remover = HookFunction(SITE, editing_function=lambda x: handles[victim].remove(), capture=False)
    fm.register_forward_hook(remover)
    plain = models.net()(models.tokens())
    for _ in range(2):
        assert torch.equal(fm(models.tokens()), plain)
    calls = {n: len(fm.output_ptr.get(n, [])) for n in ("emb", "head")}
    assert calls == ({"emb": 1, "head": 2} if order == "after" else {"emb": 2, "head": 0})


def test_hooks_that_add_others_as_often_as_they_run() -> None:
    fm = FlexModel(models.net(), {})

    def more(x: Tensor) -> None:
        fm.register_forward_hook(HookFunction("head", capture=False, editing_function=lambda x: x + 1.0))

    fm.register_forward_hook(HookFunction("emb", editing_function=more))
    plain = models.net()(models.tokens())
    outs = [fm(models.tokens()) for _ in range(3)]
    added = [float((o - plain).detach().mean().round()) for o in outs]
    assert added in ([1.0, 2.0, 3.0], [0.0, 1.0, 2.0])
    assert len(fm.output_ptr["emb"]) == 3


def test_a_block_entered_within_a_hook() -> None:
    fm, inner = FlexModel(models.net()), []

    def look(x: Tensor) -> None:
        with fm.capture("head") as acts:
            pass
        inner.append(len(acts))

    with fm.capture(SITE, "head") as acts, fm.edit(SITE, look):
        fm(models.tokens())
    assert inner == [0] and len(acts.calls(SITE)) == 1 and len(acts.calls("head")) == 1
    assert not installed(fm.module)


def test_the_model_called_within_a_hook() -> None:
    """A hook that runs the model anew, as a judge of its own input, is met by that call's values as well."""
    fm, depth, outs = FlexModel(models.net(), {}), [0], []

    def again(x: Tensor) -> None:
        if not depth[0]:
            depth[0] = 1
            outs.append(fm(models.tokens(2)))
            depth[0] = 0

    fm.register_forward_hook(HookFunction("head"))
    fm.register_forward_hook(HookFunction("emb", editing_function=again, capture=False))
    outs.append(fm(models.tokens()))
    plain = models.net()
    for out, ids in zip(outs, (models.tokens(2), models.tokens()), strict=True):
        assert torch.equal(out, plain(ids))
    assert sorted(v.shape[0] for v in fm.output_ptr["head"]) == [2, 4]


def _evaluation(engine: str, steps: tuple[int, int]) -> list[Any]:
    """Training steps in lockstep, with evaluation of unequal length between them."""
    rank = dist.get_rank()
    placed = engines.place(engine, models.net())
    plain, seen = models.net(), []
    fm = FlexModel(placed.model, {}, deliver="all")
    fm.register_forward_hook(HookFunction("head"))
    want: list[Tensor] = []
    torch_hook(plain, "head", "forward", keep(seen))
    for epoch in range(2):
        full = (models.tokens() + epoch) % 32
        engines.loss(plain(full)).backward()
        engines.local_loss(engine, fm(placed.mine(full))).backward()
        with torch.no_grad():
            for step in range(max(steps)):
                there = [(models.tokens(2) + step + 7 * r + epoch) % 32 for r in range(2) if step < steps[r]]
                plain(torch.cat(there))
            for step in range(steps[rank]):
                fm((models.tokens(2) + step + 7 * rank + epoch) % 32)
        fm.flush()
        want, seen[:] = [*want, *seen], []
    got = fm.output_ptr["head"]
    ok = len(got) == len(want) and all(relative_error(g, w) < 1e-5 for g, w in zip(got, want, strict=True))
    return [ok, len(got), fm.hooks()[0].fired]


@pytest.mark.parametrize("steps", [(3, 1), (1, 4), (2, 2)])
def test_evaluation_of_unequal_length_between_training_steps(steps: tuple[int, int]) -> None:
    total = 2 + 2 * max(steps)
    assert run_world(2, _evaluation, "ddp", steps) == [[True, total, 2 + 2 * n] for n in steps]


@pytest.mark.parametrize("engine", ["ddp", "tp"])
def test_a_wrapped_part_of_a_wrapped_model_under_engines(engine: str) -> None:
    for got in run_world(2, _inner_and_outer, engine):
        assert got == [[True, True], 1, [], [1, 1]]
