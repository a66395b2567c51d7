"""Hooks that did not fire: each is told of once, with its reason; and what is right is not told of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import engines
import models
import pipelines
import pytest
import torch
import torch.nn.functional as F
from conftest import installed, torch_hook
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from worlds import run_world

from flex_model import FlexModel, HookFunction
from flex_model.errors import DeliveryError, MissedHookWarning


class Odd(nn.Module):
    """Children that its forward does something else with than calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(8, 8)
        self.direct = nn.Linear(8, 8)
        self.fused = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)
        self.holder = models.MLP()
        self.train_only = nn.Linear(8, 8)
        self.passed = nn.Linear(8, 8)
        self.dropped = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.leaves = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.tables = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
        self.encoder = Encoder()
        self.late = nn.Linear(8, 8)

    def forward(self, x: Tensor, early: bool = False) -> Tensor:
        x = self.plain(x).to(self.unused.weight.dtype)
        x = self.direct.forward(x)
        x = F.linear(x, self.fused.weight, self.fused.bias)
        x = self.holder.down(self.holder.act(self.holder.up(x)))
        if self.training:
            x = self.train_only(x)
        x = checkpoint(self.passed, x, use_reentrant=False)
        for i, layer in enumerate(self.dropped):
            if i == 1:
                continue
            x = layer(x)
        x = self.experts[0](x)
        for leaf in self.leaves:
            x = leaf.forward(x)
        x = self.tables["a"](x)
        x = self.encoder.encode(x)
        if early:
            return x
        return self.late(x)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def encode(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x)


def odd() -> Odd:
    torch.manual_seed(0)
    return Odd().eval()


X = torch.ones(2, 8)
CERTAIN = {
    "direct": r"Odd.forward calls its .forward\(\) directly",
    "fused": "Odd.forward uses its weight without calling it",
    "unused": "Odd.forward does not use it",
    "holder": "Odd.forward uses its parts without calling it",
    "leaves.1": r"Odd.forward calls its .forward\(\) directly",
    "encoder": r"Odd.forward calls its .encode\(\) directly",
}
LATER = {
    "train_only": "Odd.forward calls it in some cases only, and none of them came",
    "late": "Odd.forward calls it in some cases only, and none of them came",
}
QUIET = {
    "dropped.1": "Odd.forward runs only some of 'dropped', and not this one",
    "experts.1": "Odd.forward runs only some of 'experts', and not this one",
    "tables.b": "Odd.forward runs only some of 'tables', and not this one",
}
FIRES = ("plain", "passed", "holder.up", "dropped.0", "experts.0", "tables.a", "encoder.inner")


def said(run: Callable[[], Any]) -> list[str]:
    """The warnings of this kind that a run gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if w.category is MissedHookWarning]


@pytest.fixture(autouse=True)
def _uncompiled() -> Iterator[None]:
    yield
    torch.compiler.reset()


# -- forwards ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
@pytest.mark.parametrize("name", CERTAIN)
def test_a_registered_hook_that_cannot_fire_is_told_of_once(name: str, kind: str) -> None:
    fm = FlexModel(odd(), {})
    getattr(fm, f"register_{kind}_hook")(HookFunction(name))
    with pytest.warns(MissedHookWarning, match=rf"the hook on {name} \({kind}\) did not fire: {CERTAIN[name]}"):
        fm(X)
    assert not said(lambda: [fm(X) for _ in range(5)])
    (row,) = fm.hooks()
    assert row.fired == 0 and row.missed
    assert not said(fm.restore)


@pytest.mark.parametrize("name", [*LATER, *QUIET])
def test_a_branch_that_was_not_taken_is_no_matter_of_one_call(name: str) -> None:
    fm = FlexModel(odd(), {})
    handle = fm.register_forward_hook(HookFunction(name))
    assert not said(lambda: [fm(X, early=name == "late") for _ in range(5)])
    assert {**LATER, **QUIET}[name] in fm.hooks()[0].missed
    told = said(handle.remove)
    assert [LATER[name] in t for t in told] == [True] if name in LATER else not told


def test_a_branch_that_is_taken_later_fires() -> None:
    fm = FlexModel(odd(), {})
    handle = fm.register_forward_hook(HookFunction("train_only"))
    assert not said(lambda: [fm(X) for _ in range(5)])
    fm.train()
    fm(X)
    assert [(r.fired, r.missed) for r in fm.hooks()] == [(1, "")]
    assert not said(handle.remove)


@pytest.mark.parametrize("name", [*CERTAIN, *LATER, *QUIET])
def test_blocks_tell_at_their_end_and_where_the_value_is_asked_for(name: str) -> None:
    fm = FlexModel(odd())
    why = {**CERTAIN, **LATER, **QUIET}[name]

    def capture() -> None:
        with fm.capture(name, "plain") as acts:
            fm(X, early=name == "late")
            with pytest.raises(DeliveryError, match=why):
                acts[name]
        with pytest.raises(DeliveryError, match=why):
            acts[name]
        assert acts["plain"].shape == (2, 8)

    def edit() -> None:
        with fm.edit(name, lambda x: x * 0):
            fm(X, early=name == "late")

    for run in (capture, edit):
        told = said(run)
        assert len(told) == (name not in QUIET) and all("in this block" in t for t in told)
    assert not installed(fm.module)


def test_what_fires_is_not_told_of() -> None:
    fm = FlexModel(odd(), {})
    for name in FIRES:
        fm.register_forward_hook(HookFunction(name))

    def run() -> None:
        with fm.capture(*FIRES), fm.edit("passed", lambda x: x):
            fm(X)

    assert not said(run) and not said(fm.restore)


def test_one_warning_for_all_that_have_one_reason() -> None:
    fm = FlexModel(odd())

    def run() -> None:
        with fm.capture("leaves.*"):
            fm(X)

    (told,) = said(run)
    assert told.startswith("the hooks on leaves.0 (forward), leaves.1 (forward) did not fire in this block")


def test_a_parent_that_did_not_run_is_the_reason() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = models.MLP(), models.MLP()

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x)

    fm = FlexModel(Outer())
    match = r"'second' did not run: .*Outer.forward does not use it"
    with pytest.warns(MissedHookWarning, match=match), fm.capture("second.*"):
        fm(X)


def test_nothing_called_the_model() -> None:
    fm = FlexModel(odd())
    with (
        fm.capture("plain") as acts,
        pytest.raises(DeliveryError, match="nothing has called the model since"),
    ):
        acts["plain"]
    assert not said(lambda: fm.restore())


def test_a_part_was_called_by_itself() -> None:
    fm = FlexModel(odd(), {})
    fm.register_forward_hook(HookFunction("plain"))
    assert not said(lambda: fm.module.encoder(X))  # a registered hook waits for a call that it is in

    def run() -> None:
        with fm.capture("plain", "encoder") as acts:
            fm.module.encoder(X)
        with pytest.raises(DeliveryError, match="only other parts of the model were called"):
            acts["plain"]

    assert len(said(run)) == 1
    assert not said(lambda: fm(X))


def test_the_models_own_forward_was_called_directly() -> None:
    fm = FlexModel(models.net())

    def run() -> None:
        with fm.capture("", "head"):
            fm.module.forward(models.tokens())

    (told,) = said(run)
    assert "(the model) (forward) did not fire in this block" in told


def test_a_module_that_was_replaced() -> None:
    fm = FlexModel(models.net(), {})
    fm.register_forward_hook(HookFunction("head"))
    fm.module.head = nn.Linear(8, 32)
    with pytest.warns(MissedHookWarning, match="head .* no longer part of the model"):
        fm(models.tokens())


def test_a_forward_that_was_replaced_by_a_fused_one() -> None:
    model = models.net()

    def fused_mlp(x: Tensor) -> Tensor:
        return x * 2

    model.layers[0].mlp.forward = fused_mlp
    fm = FlexModel(model, {})
    fm.register_forward_hook(HookFunction("layers.0.mlp.act"))
    with pytest.warns(MissedHookWarning, match="fused_mlp, which was put in the place of MLP's forward, does not"):
        fm(models.tokens())


def test_torchs_own_fused_attention() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    fm = FlexModel(model)

    def run() -> None:
        with fm.capture("self_attn", "self_attn.out_proj", "linear1"):
            fm(torch.randn(2, 3, 8))

    (told,) = said(run)
    assert "self_attn.out_proj (forward)" in told and "linear1" not in told and "without calling it" in told


def test_a_forward_wrapped_in_a_closure_is_read_through() -> None:
    """As transformers' tensor parallelism and accelerate do it: the new forward calls the old one."""
    model = odd()
    old = model.forward

    def around(*args: Any, **kwargs: Any) -> Tensor:
        return old(*args, **kwargs)

    model.forward = around
    fm = FlexModel(model, {})
    fm.register_forward_hook(HookFunction("train_only"))
    fm.register_forward_hook(HookFunction("unused"))
    told = said(lambda: fm(X))
    assert len(told) == 1 and "unused (forward)" in told[0]


def test_code_that_cannot_be_read_is_told_of_at_the_end_only() -> None:
    scope: dict[str, Any] = {"nn": nn}
    exec(
        "class Hidden(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__(); self.a = nn.Linear(8, 8); self.b = nn.Linear(8, 8)\n"
        "    def forward(self, x):\n"
        "        return self.a(x)\n",
        scope,
    )
    fm = FlexModel(scope["Hidden"](), {})
    handle = fm.register_forward_hook(HookFunction("b"))
    assert not said(lambda: fm(X))
    assert ["cannot be read" in t for t in said(handle.remove)] == [True]


def test_no_names_in_the_code() -> None:
    class Dynamic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a0, self.a1 = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return getattr(self, "a0")(x)  # noqa: B009

    fm = FlexModel(Dynamic(), {})
    fm.register_forward_hook(HookFunction("a0"))
    handle = fm.register_forward_hook(HookFunction("a1"))
    assert not said(lambda: [fm(X) for _ in range(4)])
    assert len(said(handle.remove)) == 1


def test_disabled_hooks_and_values_without_tensors_are_not_told_of() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.none = Nothing()
            self.a = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            self.none(x)
            return x

    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> None:
            return None

    fm = FlexModel(Pair(), {})
    fm.register_forward_hook(HookFunction("a"))
    fm.register_forward_hook(HookFunction("none"))
    fm.update_hook_groups("a", "probes")
    with warnings.catch_warnings(record=True) as caught, fm.groups("probes", complement=True):
        warnings.simplefilter("always")
        fm(X)
    assert ["has nothing to do" in str(w.message) for w in caught] == [True]


def test_hooks_that_fire_cost_nothing_afterwards() -> None:
    fm = FlexModel(models.net(), {})
    fm.register_forward_hook(HookFunction("head"))
    fm.register_full_backward_hook(HookFunction("norm"))
    assert len(fm._runtime.missed.pending) == 2
    fm(models.tokens()).sum().backward()
    assert not fm._runtime.missed.pending


# -- gradients -----------------------------------------------------------------------------------------------------
class Cut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.plain = nn.Linear(8, 8)
        self.quiet = nn.Linear(8, 8)
        self.lost = nn.Linear(8, 8)
        self.aside = nn.Linear(8, 8)
        self.count = Count()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.frozen(x)
        with torch.no_grad():
            y = self.quiet(x)
        x = self.plain(x + y)
        self.count(x)
        return x + self.lost(x).detach(), self.aside(x)


class Count(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x > 0).sum()


GRADIENTS = {
    "frozen": "its value does not require a gradient: what it was made from is frozen, or has none",
    "quiet": "it ran with gradients turned off",
    "lost": "nothing that the model returned depends on it with a graph",
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_gradient_that_cannot_come(name: str) -> None:
    fm = FlexModel(Cut(), {})
    fm.register_full_backward_pre_hook(HookFunction(name))
    fm.register_full_backward_pre_hook(HookFunction("plain"))
    with torch.no_grad():
        assert not said(lambda: fm(X))
    loss = fm(X)[0].sum()
    with pytest.warns(MissedHookWarning, match=rf"{name} \(full_backward_pre\) did not fire: {GRADIENTS[name]}"):
        loss.backward()
    assert not said(lambda: fm(X)[0].sum().backward())
    assert [bool(r.missed) for r in fm.hooks()] == [True, False] and len(fm.output_ptr["plain"]) == 2


def test_a_loss_that_does_not_depend_on_it_may_be_another_next_time() -> None:
    fm = FlexModel(Cut(), {})
    handle = fm.register_full_backward_pre_hook(HookFunction("aside"))
    assert not said(lambda: [fm(X)[0].sum().backward() for _ in range(4)])
    assert "backward() was called on does not depend on it" in fm.hooks()[0].missed
    assert len(said(handle.remove)) == 1


def test_a_parameter_without_a_gradient() -> None:
    fm = FlexModel(Cut(), {})
    fm.register_hook(HookFunction("plain.weight"))
    handle = fm.register_hook(HookFunction("aside.weight"))
    assert not said(lambda: fm(X)[0].sum().backward())
    assert ["does not depend on this parameter" in t for t in said(handle.remove)] == [True]
    fm = FlexModel(odd(), {})
    fm.register_hook(HookFunction("unused.weight"))
    fm.register_forward_hook(HookFunction("plain"))
    with pytest.warns(MissedHookWarning, match=r"unused.weight \(tensor\) did not fire: .*does not use it"):
        fm(X).sum().backward()


@pytest.mark.parametrize("name", [*GRADIENTS, "aside", "count"])
def test_gradients_that_a_capture_missed(name: str) -> None:
    fm = FlexModel(Cut())
    kind = {"hook_type": "full_backward_pre"}

    def run() -> None:
        with fm.capture(name, "plain", **kind) as acts:
            fm(X)[0].sum().backward()
        assert acts["plain"].shape == (2, 8)
        with pytest.raises(DeliveryError, match=f"has not arrived: .*{GRADIENTS.get(name, 'it')}"):
            acts[name]

    assert len(said(run)) == (name != "count")

    def with_values() -> None:
        with fm.capture(name, grad=True) as acts:
            fm(X)[0].sum().backward()
        if name != "frozen":  # made to require one
            with pytest.raises(DeliveryError, match=f"gradient of '{name}' has not arrived"):
                acts.grad(name)

    assert len(said(with_values)) == (name not in ("count", "frozen"))


class Positions(nn.Module):
    """Positions have no gradient, and that is no fault."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.rotary = nn.Linear(8, 8), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x) * self.rotary(torch.ones(8))


def test_what_has_no_gradient_among_many_that_have_one() -> None:
    fm = FlexModel(Positions(), {})

    def run(pattern: str) -> None:
        with fm.capture(pattern, hook_type="full_backward_pre") as acts:
            fm(X).sum().backward()
        with pytest.raises(DeliveryError, match="does not require a gradient"):
            acts["rotary"]

    assert not said(lambda: run("*")) and len(said(lambda: run("rotary"))) == 1
    fm.register_full_backward_pre_hook(HookFunction("rotary"))
    assert len(said(lambda: fm(X).sum().backward())) == 1


def test_no_backward_ran() -> None:
    fm = FlexModel(models.net(), {})
    handle = fm.register_full_backward_hook(HookFunction("head"))

    def run() -> None:
        with fm.capture("head", grad=True) as acts:
            fm(models.tokens())
        with pytest.raises(DeliveryError, match="no backward has come to it"):
            acts.grad("head")

    assert not said(run)
    assert not said(handle.remove)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_under_checkpointing_are_met(reentrant: bool) -> None:
    class Checkpointed(models.Net):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.emb(ids)
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=reentrant)
            return self.head(self.norm(x))

    fm = FlexModel(Checkpointed(), {})
    for name in ("layers.0.mlp", "layers.1", "head", "emb"):
        fm.register_full_backward_pre_hook(HookFunction(name))
        fm.register_forward_hook(HookFunction(name))
    assert not said(lambda: [fm(models.tokens()).sum().backward() for _ in range(2)]) and not said(fm.restore)


# -- under engines -------------------------------------------------------------------------------------------------
def _of_an_engine(engine: str) -> list[Any]:
    model = models.net()
    model.register_module("extra", nn.Tanh())
    fm = FlexModel(engines.place(engine, model).model)
    fm.register_forward_hook(HookFunction("extra"))
    fm.register_forward_hook(HookFunction("head"))
    fm.register_full_backward_pre_hook(HookFunction("layers.0.mlp"))
    told = said(lambda: [engines.local_loss(engine, fm(models.tokens())).backward() for _ in range(2)])
    return [len(told), "extra (forward) did not fire: Net.forward does not use it" in told[0], not said(fm.restore)]


@pytest.mark.parametrize("engine", ["ddp", "fsdp1", "fsdp1_orig", "fsdp2", "tp", "sp"])
def test_under_an_engine(engine: str) -> None:
    assert run_world(2, _of_an_engine, engine) == [[1, True, True]] * 2


def _of_a_pipeline(schedule: str) -> list[Any]:
    """Told of on the stage that holds the module, after the step; what is on other stages is their matter."""

    def prepare(part: nn.Module) -> nn.Module:
        if part.emb is not None:
            part.extra = nn.Tanh()
        return part

    pipe = pipelines.Pipe(models.net(layers=4), schedule, prepare=prepare)
    run, fm = pipe.schedule(), FlexModel(pipe.module, {})
    fm.register_forward_hook(HookFunction("extra"))
    for name in ("layers.0.mlp", "layers.3", "head"):
        fm.register_forward_hook(HookFunction(name))
    fm.register_full_backward_pre_hook(HookFunction("layers.3.mlp"))
    ids = models.tokens(batch=8)
    return [len(said(lambda: [pipelines.step(run, ids) for _ in range(2)])), len(said(fm.restore))]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved"])
def test_in_a_pipeline(schedule: str) -> None:
    assert run_world(2, _of_a_pipeline, schedule) == [[1, 0], [0, 0]]


# -- compilation ---------------------------------------------------------------------------------------------------
IDS = models.tokens()
SITES = ("", "layers.0", "layers.0.mlp.act", "layers.1.mlp", "head")


def whole(model: models.Net, backend: str) -> nn.Module:
    return torch.compile(model, backend=backend)


def in_place(model: models.Net, backend: str) -> nn.Module:
    model.compile(backend=backend)
    return model


def layers(model: models.Net, backend: str) -> nn.Module:
    for layer in model.layers:
        layer.compile(backend=backend)
    return model


def swapped(model: models.Net, backend: str) -> nn.Module:
    for i, layer in enumerate(model.layers):
        model.layers[i] = torch.compile(layer, backend=backend)
    return model


def forwards(model: models.Net, backend: str) -> nn.Module:
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward, backend=backend)
    return model


HOWS = {f.__name__: f for f in (whole, in_place, layers, swapped, forwards)}


def _wrong(got: dict[str, list[Tensor]], factor: float) -> list[str]:
    plain, want = models.net(), {}
    for name in SITES:  # a hook sees the value before its own edit
        plain.get_submodule(name).register_forward_hook(lambda m, a, o, n=name: want.__setitem__(n, o.detach()))
    torch_hook(plain, "layers.1.mlp", "forward", lambda x: x * factor)
    plain(IDS)
    return [n for n in SITES if len(got[n]) != 1 or not torch.allclose(got[n][0], want[n], atol=1e-5)]


def _fires(backend: str, how: str, when: str, through: bool) -> None:
    torch.compiler.reset()
    model = models.net()
    compiled: nn.Module = HOWS[how](model, backend) if when == "before wrapping" else model
    fm = FlexModel(compiled, {})

    def hook() -> None:
        for name in SITES:
            edit = (lambda x: x * 3.0) if name == "layers.1.mlp" else None
            fm.register_forward_hook(HookFunction(name, editing_function=edit))

    if when == "after the hooks":
        hook()
    if when != "before wrapping":
        compiled = HOWS[how](model, backend)
    target = fm if through else compiled
    if when != "after the hooks":
        before = target(IDS)
        hook()
    for _ in range(2):
        fm.output_ptr.clear()
        assert not said(lambda: target(IDS))
        assert not _wrong(fm.output_ptr, 3.0)
    fm.restore()
    fm.output_ptr.clear()
    after = target(IDS)
    assert not fm.output_ptr and torch.allclose(after, models.net()(IDS), atol=1e-5)
    assert when == "after the hooks" or torch.equal(before, after)


CASES = (
    *(("eager", how, "before wrapping") for how in HOWS),
    *(("eager", how, "after wrapping") for how in ("whole", "layers", "swapped")),
    *(("eager", how, "after the hooks") for how in ("whole", "layers")),
    ("aot_eager", "whole", "before wrapping"),
    ("aot_eager", "layers", "after wrapping"),
)


@pytest.mark.parametrize(("backend", "how", "when"), CASES)
def test_hooks_on_compiled_models_fire(backend: str, how: str, when: str) -> None:
    """Also where the compiled code has run before: what is compiled steps aside while a hook is inside it."""
    for through in (True, False):
        _fires(backend, how, when, through)


def test_a_function_around_the_model_that_was_compiled() -> None:
    """Nobody can see its calls, nor which model it is for: what to do is said when the hooks come off."""
    model = models.net()
    fm = FlexModel(model, {})
    step = torch.compile(lambda ids: model(ids) * 2, backend="eager")
    step(IDS)

    def capture() -> None:
        with fm.capture("layers.0.mlp.act"):
            step(IDS)

    assert ["nothing has called the model since; if what calls it was compiled" in t for t in said(capture)] == [True]
    handle = fm.register_forward_hook(HookFunction("layers.0.mlp", editing_function=lambda x: x * 0))
    step(IDS)
    assert "nothing has called the model" in fm.hooks()[0].missed
    assert ["torch.compiler.reset() with the hooks on" in t for t in said(handle.remove)] == [True]

    fm.register_forward_hook(HookFunction("layers.0.mlp", editing_function=lambda x: x * 0))
    torch.compiler.reset()
    edited = step(IDS)
    torch_hook(plain := models.net(), "layers.0.mlp", "forward", lambda x: x * 0)
    assert torch.allclose(edited, plain(IDS) * 2, atol=1e-5)
    assert not said(fm.restore)


def test_parts_without_hooks_stay_compiled() -> None:
    ran: list[int] = []

    def backend(graph: Any, example: Any) -> Any:
        return lambda *args: (ran.append(1), graph.forward(*args))[1]

    model = models.net()
    for layer in model.layers:
        layer.compile(backend=backend)
    fm = FlexModel(model)
    fm(IDS)
    ran.clear()
    with fm.capture("layers.0.mlp.act"):
        fm(IDS)
    assert len(ran) == 1  # the other layer
    fm(IDS)
    assert len(ran) == 3 and all(m._compiled_call_impl is not None for m in model.layers)


@pytest.mark.parametrize("when", ["first", "after the hooks"])
def test_the_wrapper_compiled_itself(when: str) -> None:
    fm = FlexModel(models.net(), {})
    if when == "first":
        fm.compile(backend="eager")
        fm(IDS)
    fm.register_forward_hook(HookFunction("layers.0.mlp.act"))
    if when == "after the hooks":
        fm.compile(backend="eager")
    fm(IDS)
    assert len(fm.output_ptr["layers.0.mlp.act"]) == 1


def test_another_model_of_the_class_was_compiled() -> None:
    other = torch.compile(models.net(), backend="eager")
    other(IDS)
    model = models.net()
    fm = FlexModel(model, {})
    compiled = torch.compile(model, backend="eager")
    fm.register_forward_hook(HookFunction("layers.0.mlp.act"))
    compiled(IDS), compiled(IDS)
    assert len(fm.output_ptr["layers.0.mlp.act"]) == 2


def test_layers_compiled_after_a_hook_on_one_of_them() -> None:
    """Code compiled for a layer without a hook may be run for the next one: told of, and right from then on."""
    model = models.net()
    fm = FlexModel(model, {})
    fm.register_forward_hook(HookFunction("layers.1.mlp.act"))
    layers(model, "eager")
    told = said(lambda: fm(IDS))
    missed = 1 - len(fm.output_ptr.get("layers.1.mlp.act", []))
    assert len(told) == missed and all("compiled" in t for t in told)
    assert not said(lambda: fm(IDS))
    assert len(fm.output_ptr["layers.1.mlp.act"]) == 2 - missed


def test_gradients_of_compiled_models() -> None:
    model = models.net()
    fm = FlexModel(torch.compile(model, backend="aot_eager"), {})
    fm(IDS).sum().backward()
    model.zero_grad()
    fm.register_full_backward_pre_hook(HookFunction("layers.0.mlp"))
    fm(IDS).sum().backward()
    seen: list[Tensor] = []
    torch_hook(plain := models.net(), "layers.0.mlp", "full_backward_pre", lambda g: seen.append(g))
    plain(IDS).sum().backward()
    assert torch.allclose(fm.output_ptr["layers.0.mlp"][0], seen[0], atol=1e-5)
