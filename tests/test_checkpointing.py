"""Activation checkpointing: captures once, edits again in recomputation, gradients as without it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import REGISTER, gradients, keep, same_gradients, torch_hook
from models import Net, inputs, make, net, tokens
from oracle import relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flex_model import FlexModel, HookFunction

BOTH = pytest.mark.parametrize("reentrant", [True, False])


class Checkpointed(Net):
    """Every block is run again in the backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.head(self.norm(x))


def checkpointed(reentrant: bool) -> Checkpointed:
    torch.manual_seed(0)
    return Checkpointed(reentrant)


def step(model: nn.Module, batch: int = 4) -> None:
    model(tokens(batch)).pow(2).mean().backward()


@BOTH
@pytest.mark.parametrize("kind", REGISTER)
def test_a_value_is_captured_once(reentrant, kind):
    name = "layers.0.mlp.up.weight" if kind == "tensor" else "layers.0.mlp"
    plain, seen = net(), []
    torch_hook(plain, name, kind, keep(seen))
    fm = FlexModel(checkpointed(reentrant), {})
    getattr(fm, REGISTER[kind])(HookFunction(name))
    for _ in range(2):
        step(plain), step(fm)
    assert [torch.equal(a, b) for a, b in zip(fm.output_ptr[name], seen, strict=True)] == [True, True]
    assert same_gradients(fm.module, plain)
    assert fm.hooks()[0].fired == 2


@BOTH
@pytest.mark.parametrize("name", ["layers.0", "layers.1.mlp", "layers.0.mlp.up"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
@pytest.mark.parametrize("capture", [True, False])
def test_an_edit_runs_again(reentrant, name, kind, capture):
    plain, runs, seen = net(), [], []
    torch_hook(plain, name, kind, lambda x: (keep(seen)(x), x.softmax(-1) * x)[1])
    fm = FlexModel(checkpointed(reentrant), {})
    hook = HookFunction(name, editing_function=lambda x: (runs.append(1), x.softmax(-1) * x)[1], capture=capture)
    getattr(fm, REGISTER[kind])(hook)
    step(plain), step(fm)
    assert same_gradients(fm.module, plain) and len(runs) == 2
    assert len(fm.output_ptr.get(name, [])) == capture
    assert not capture or torch.equal(fm.output_ptr[name][0], seen[0])


@BOTH
@pytest.mark.parametrize("kind", ["full_backward", "full_backward_pre", "tensor"])
def test_a_gradient_is_edited_once(reentrant, kind):
    name = "layers.1.mlp.up.weight" if kind == "tensor" else "layers.1.mlp"
    plain, runs = net(), []
    torch_hook(plain, name, kind, lambda g: g * 3)
    fm = FlexModel(checkpointed(reentrant))
    getattr(fm, REGISTER[kind])(HookFunction(name, editing_function=lambda g: (runs.append(1), g * 3)[1]))
    step(plain), step(fm)
    assert same_gradients(fm.module, plain) and len(runs) == 1


@BOTH
@pytest.mark.parametrize("form", ["hook", "edit", "hook with random"])
def test_recomputation_sees_save_ctx_as_it_was(reentrant, form):
    def counting(module, x, save_ctx, modules):
        save_ctx.count = save_ctx.__dict__.get("count", 0) + 1
        return x * save_ctx.count

    plain, count = net(), []
    for name in ("layers.0.mlp", "layers.1.mlp"):
        torch_hook(plain, name, "forward", lambda x: (count.append(1), x * len(count))[1])
    fm = FlexModel(checkpointed(reentrant))
    if form == "edit":
        with fm.edit("layers.*.mlp", counting):
            step(plain), step(fm)
    else:
        for name in ("layers.0.mlp", "layers.1.mlp"):
            fm.register_forward_hook(HookFunction(name, editing_function=counting, random=form != "hook"))
        step(plain), step(fm)
    assert same_gradients(fm.module, plain)
    assert fm.save_ctx.count == 2


class Twice(nn.Module):
    """One module two times in a forward, each time checkpointed."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.reentrant = nn.Linear(8, 8), nn.Linear(8, 8), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(2):
            x = self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)
        return x

    def block(self, x: Tensor) -> Tensor:
        return self.inner(x).tanh()


@BOTH
def test_each_firing_of_a_module_has_its_own_snapshot(reentrant):
    def counting(module, x, save_ctx, modules):
        save_ctx.count = save_ctx.__dict__.get("count", 0) + 1
        return x * save_ctx.count

    x, plain, count = torch.randn(3, 8), Twice(None), []
    torch_hook(plain, "inner", "forward", lambda x: (count.append(1), x * len(count))[1])
    fm = FlexModel(Twice(reentrant))
    fm.register_forward_hook(HookFunction("inner", editing_function=counting))
    for model in (plain, fm):
        model(x).sum().backward()
    assert all(
        relative_error(a, b) < 1e-6
        for a, b in zip(gradients(fm.module).values(), gradients(plain).values(), strict=True)
    )


@BOTH
def test_random_edits_replay(reentrant):
    drawn: list[Tensor] = []

    def noisy(x: Tensor) -> Tensor:
        drawn.append(torch.randn_like(x))
        return x * drawn[-1]

    fm = FlexModel(checkpointed(reentrant))
    fm.register_forward_hook(HookFunction("layers.0.mlp", editing_function=noisy, random=True))
    plain = net()
    outs = [fm(tokens(b)).pow(2).mean() for b in (4, 3)]  # two forwards, then one backward
    sum(outs).backward()
    assert len(drawn) == 4
    first = iter(drawn[:2])
    torch_hook(plain, "layers.0.mlp", "forward", lambda x: x * next(first))
    sum(plain(tokens(b)).pow(2).mean() for b in (4, 3)).backward()
    assert same_gradients(fm.module, plain)


@BOTH
def test_gradients_of_captured_values(reentrant):
    plain, seen = net(), []
    torch_hook(plain, "layers.0.mlp", "full_backward_pre", keep(seen))
    fm = FlexModel(checkpointed(reentrant))
    with fm.capture("layers.0.mlp", grad=True) as acts:
        step(plain), step(fm)
    assert torch.equal(acts.grad("layers.0.mlp"), seen[0]) and len(acts.calls("layers.0.mlp")) == 1
    assert same_gradients(fm.module, plain)


@BOTH
def test_a_trainable_module_in_a_recomputed_edit(reentrant):
    def probe() -> nn.Module:
        torch.manual_seed(7)
        return nn.Linear(8, 8)

    plain, mine = net(), probe()
    torch_hook(plain, "layers.0.mlp", "forward", mine)
    fm = FlexModel(checkpointed(reentrant))
    fm.register_trainable_module("probe", probe())
    fm.register_forward_hook(
        HookFunction("layers.0.mlp", editing_function=lambda m, x, c, modules: modules["probe"](x))
    )
    step(plain), step(fm)
    assert same_gradients(fm.module, plain) and same_gradients(fm.trainable_modules["probe"], mine)


def scaled(module, x, save_ctx, modules):
    return x * save_ctx.factor


def _backwards(fm: FlexModel, run: Callable[[nn.Module], None]) -> None:
    """``run`` on the plain model and on ``fm``; ``save_ctx.factor`` is 2 in the forward."""
    plain = net()
    torch_hook(plain, "layers.0.mlp", "forward", lambda x: x * 2.0)
    fm.register_forward_hook(HookFunction("layers.0.mlp", editing_function=scaled))
    fm.save_ctx.factor = 2.0
    run(plain), run(fm)
    assert same_gradients(fm.module, plain)


@BOTH
def test_two_forwards_before_their_backwards(reentrant):
    fm = FlexModel(checkpointed(reentrant))

    def run(model: nn.Module) -> None:
        one, two = model(tokens(4)), model(tokens(3))
        fm.save_ctx.factor = 5.0 if model is fm else 2.0  # written later: no recomputation may see it
        one.sum().backward()
        two.pow(2).mean().backward()

    _backwards(fm, run)


def test_two_backwards_through_one_forward():
    fm = FlexModel(checkpointed(False))

    def run(model: nn.Module) -> None:
        out = model(tokens())
        fm.save_ctx.factor = 5.0 if model is fm else 2.0
        out.sum().backward(retain_graph=True)
        out.pow(2).mean().backward()

    _backwards(fm, run)


@BOTH
def test_checkpointing_of_a_language_model(reentrant):
    plain, seen = make("llama"), []
    plain.train()
    torch_hook(plain, "model.layers.0.mlp", "forward", lambda x: (keep(seen)(x), x * 1.5)[1])
    model = make("llama")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fm = FlexModel(model.train(), {})
    fm.register_forward_hook(HookFunction("model.layers.0.mlp", editing_function=lambda x: x * 1.5))
    if reentrant:
        model.enable_input_require_grads()
    batch = inputs("llama")
    for m in (plain, fm):
        m(**batch).logits.pow(2).mean().backward()
    assert (
        torch.equal(fm.output_ptr["model.layers.0.mlp"][0], seen[0]) and len(fm.output_ptr["model.layers.0.mlp"]) == 1
    )
    assert same_gradients(fm.module, plain)
