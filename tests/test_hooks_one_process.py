"""The five hook types on one process, against torch's own hooks."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from conftest import REGISTER, installed, keep, same_gradients, torch_hook, unchanged
from models import net, tokens
from oracle import relative_error
from torch import Tensor, nn
from worlds import run_world

from flex_model import FlexModel, HookFunction, Site

PLACE = {kind: "layers.0.mlp" for kind in REGISTER} | {"tensor": "layers.0.mlp.up.weight"}
KINDS = list(REGISTER)


def step(model: nn.Module) -> Tensor:
    out = model(tokens())
    out.pow(2).mean().backward()
    return out.detach()


def register(fm: FlexModel, kind: str, hook: HookFunction):
    return getattr(fm, REGISTER[kind])(hook)


@pytest.mark.parametrize("kind", KINDS)
def test_reading(kind):
    plain, seen = net(), []
    torch_hook(plain, PLACE[kind], kind, keep(seen))
    fm = FlexModel(net(), {})
    register(fm, kind, HookFunction(PLACE[kind]))
    assert torch.equal(step(fm), step(plain))
    assert same_gradients(fm.module, plain)
    assert [torch.equal(a, b) for a, b in zip(fm.output_ptr[PLACE[kind]], seen, strict=True)] == [True]


@pytest.mark.parametrize("form", ["one argument", "four arguments", "in place"])
@pytest.mark.parametrize("kind", KINDS)
def test_editing(kind, form):
    def change(x: Tensor) -> Tensor:
        return x * x.abs().mean() + 0.01 * x.cumsum(-1)

    edits = {
        "one argument": change,
        "four arguments": lambda module, x, save_ctx, modules: change(x),
        "in place": lambda x: (x.mul_(2), None)[1],
    }
    plain, seen = net(), []
    expected = change if form != "in place" else (lambda x: x * 2)
    torch_hook(plain, PLACE[kind], kind, lambda x: (keep(seen)(x), expected(x))[1])
    fm = FlexModel(net(), {})
    register(fm, kind, HookFunction(PLACE[kind], editing_function=edits[form]))
    assert torch.equal(step(fm), step(plain))
    assert same_gradients(fm.module, plain)
    assert torch.equal(fm.output_ptr[PLACE[kind]][0], seen[0])  # as it was met, before the edit


@pytest.mark.parametrize("kind", KINDS)
def test_several_hooks_run_in_the_order_of_registration(kind):
    changes = [lambda x: x + 1, lambda x: x * 3, lambda x: None, lambda x: x - 2]
    plain, seen = net(), []

    def all_of_them(x: Tensor) -> Tensor:
        for change in changes:
            keep(seen)(x)
            out = change(x)
            x = x if out is None else out
        return x

    torch_hook(plain, PLACE[kind], kind, all_of_them)
    fm, order = FlexModel(net(), {}), []
    for i, change in enumerate(changes):
        register(
            fm,
            kind,
            HookFunction(PLACE[kind], editing_function=lambda x, i=i, f=change: (order.append(i), f(x))[1]),
        )
    assert torch.equal(step(fm), step(plain))
    assert same_gradients(fm.module, plain)
    assert order == [0, 1, 2, 3]
    assert all(torch.equal(a, b) for a, b in zip(fm.output_ptr[PLACE[kind]], seen, strict=True))


def test_all_types_at_once_on_one_module_and_their_keys():
    plain, seen = net(), {kind: [] for kind in KINDS[:4]}
    for kind, values in seen.items():
        torch_hook(plain, "layers.1.mlp", kind, keep(values))
    fm = FlexModel(net(), {})
    for kind in seen:
        register(fm, kind, HookFunction("layers.1.mlp"))
    for _ in range(2):
        step(fm), step(plain)
    keys = ["layers.1.mlp"] + [Site("layers.1.mlp", kind, 0) for kind in KINDS[1:4]]
    assert set(fm.output_ptr) == set(keys)
    for key, kind in zip(keys, seen, strict=True):
        assert [torch.equal(a, b) for a, b in zip(fm.output_ptr[key], seen[kind], strict=True)] == [
            True,
            True,
        ]


def test_output_is_a_list_with_one_tensor_a_call():
    fm, plain = FlexModel(net(), {}), net()
    fm.register_forward_hook(HookFunction("norm"))
    seen: list[Tensor] = []
    torch_hook(plain, "norm", "forward", keep(seen))
    for length in (6, 1, 3):
        fm(tokens(2, length)), plain(tokens(2, length))
    assert all(torch.equal(a, b) for a, b in zip(fm.output_ptr["norm"], seen, strict=True))


def test_each_backward_of_an_accumulation_keeps_its_own_gradient():
    fm, plain, seen = FlexModel(net(), {}), net(), []
    fm.register_full_backward_hook(HookFunction("norm"))
    torch_hook(plain, "norm", "full_backward", keep(seen))
    for model in (fm, plain):
        for batch in (2, 3):
            model(tokens(batch)).pow(2).mean().backward()
    assert all(torch.equal(a, b) for a, b in zip(fm.output_ptr["norm"], seen, strict=True))
    assert same_gradients(fm.module, plain)


class Shared(nn.Module):
    """One module three times in one forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.inner(x).tanh()
        return x


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_module_that_runs_several_times_in_one_forward(kind):
    x = torch.randn(2, 8, requires_grad=True)
    plain, seen = Shared(), []
    torch_hook(plain, "inner", kind, lambda t: (keep(seen)(t), t * 2)[1])
    fm = FlexModel(Shared(), {})
    register(fm, kind, HookFunction("inner", editing_function=lambda t: t * 2))
    for model in (plain, fm):
        model(x).sum().backward()
    assert len(seen) == 3
    assert all(torch.equal(a, b) for a, b in zip(fm.output_ptr["inner"], seen, strict=True))
    assert same_gradients(fm.module, plain)


class Branches(nn.Module):
    """Takes positional, keyword and nested tensors; returns a nested value."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x, (x * 2, 5), scale=x + 1)
        return out["a"] + out["b"][0] * out["b"][1]


class Inner(nn.Module):
    def forward(self, x: Tensor, pair: tuple[Tensor, int], *, scale: Tensor) -> dict[str, object]:
        return {"a": x * pair[0], "n": pair[1], "b": (scale * 2, x * scale)}


OUTPUTS = {
    0: lambda x: x * x * 2,
    "b.0": lambda x: (x + 1) * 2,
    2: lambda x: x * (x + 1),
    -1: lambda x: x * (x + 1),
}
INPUTS = {
    0: lambda x: x,
    "x": lambda x: x,
    "pair": lambda x: x * 2,
    "scale": lambda x: x + 1,
    2: lambda x: x + 1,
}


@pytest.mark.parametrize("index", OUTPUTS)
def test_unpack_idx_of_an_output(index):
    x = torch.randn(3, 4)
    fm = FlexModel(Branches(), {})
    fm.register_forward_hook(HookFunction("inner", unpack_idx=index))
    assert torch.equal(fm(x), Branches()(x))
    assert torch.equal(fm.output_ptr["inner"][0], OUTPUTS[index](x))


@pytest.mark.parametrize("index", INPUTS)
def test_unpack_idx_of_an_input(index):
    x = torch.randn(3, 4)
    fm = FlexModel(Branches(), {})
    fm.register_forward_pre_hook(HookFunction("inner", unpack_idx=index))
    assert torch.equal(fm(x), Branches()(x))
    assert torch.equal(fm.output_ptr["inner"][0], INPUTS[index](x))


def test_several_tensors_are_keyed_by_their_sites():
    x = torch.randn(3, 4)
    fm = FlexModel(Branches(), {})
    fm.register_forward_hook(HookFunction("inner", unpack_idx="all"))
    with fm.capture("inner", unpack_idx=("a", 2)) as acts:
        fm(x)
    expected = [x * x * 2, (x + 1) * 2, x * (x + 1)]
    assert set(fm.output_ptr) == {Site("inner", "forward", i) for i in range(3)}
    assert all(torch.equal(fm.output_ptr["inner", "forward", i][0], e) for i, e in enumerate(expected))
    assert list(acts) == [Site("inner", "forward", 0), Site("inner", "forward", 2)]
    assert torch.equal(acts["inner", "forward", 2], expected[2])


@pytest.mark.parametrize("index", ["b.1", 2, ("b.1",), ["a", "b.1"], "all"])
def test_edits_of_chosen_tensors(index):
    x, edited = torch.randn(3, 4), []
    which = {"all": (0, 1, 2), ("a", "b.1"): (0, 2)}.get(tuple(index) if isinstance(index, list) else index, (2,))

    def hook(module, args, out):
        a, b0, b1 = (t * 3 if i in which else t for i, t in enumerate((out["a"], *out["b"])))
        return {"a": a, "n": out["n"], "b": (b0, b1)}

    plain = Branches()
    plain.inner.register_forward_hook(hook)
    fm = FlexModel(Branches())
    with fm.edit("inner", lambda t, site: (edited.append(site.index), t * 3)[1], unpack_idx=index):
        out = fm(x)
    assert torch.equal(out, plain(x)) and edited == list(which)


def test_gradients_of_chosen_tensors():
    x = torch.randn(3, 4, requires_grad=True)
    fm = FlexModel(Branches(), {})
    fm.register_full_backward_pre_hook(HookFunction("inner", unpack_idx="b.1"))
    fm.register_full_backward_hook(HookFunction("inner", unpack_idx="scale"))
    fm(x).sum().backward()
    assert torch.allclose(fm.output_ptr["inner"][0], (x + 1) * 2)
    # out = x * 2x + 2 scale * x scale: the part of the gradient that comes by way of scale
    assert torch.allclose(fm.output_ptr["inner", "full_backward", "scale"][0], 4 * x * (x + 1))


SELECTIONS = [
    0,
    slice(1, 3),
    (slice(None), -1),
    (slice(None), slice(None, None, 2), 3),
    (..., slice(2, 5)),
    torch.tensor([0, 3]),
    (slice(None), [1, 1, 4]),
    lambda x: x[:, 2:4],
    lambda x: x.unflatten(-1, (2, 4))[..., 1, :],
    lambda x: x.mean(1),
]


@pytest.mark.parametrize("select", SELECTIONS)
def test_select_when_reading(select):
    take = select if callable(select) else lambda x: x[select]
    fm, plain, seen = FlexModel(net(), {}), net(), []
    torch_hook(plain, "layers.0.mlp", "forward", keep(seen))
    fm.register_forward_hook(HookFunction("layers.0.mlp", select=select))
    with fm.capture("layers.0.mlp", select=select) as acts:
        out = fm(tokens())
    assert torch.equal(out, plain(tokens()))
    assert torch.equal(fm.output_ptr["layers.0.mlp"][0], take(seen[0]))
    assert torch.equal(acts["layers.0.mlp"], take(seen[0]))


def test_a_selection_keeps_no_memory_of_the_rest():
    fm = FlexModel(net())
    with fm.capture("layers.0.mlp", select=(slice(None), -1)) as acts:
        fm(tokens())
    value = acts["layers.0.mlp"]
    assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
@pytest.mark.parametrize("select", [s for i, s in enumerate(SELECTIONS) if i not in (6, 9)])
def test_select_when_editing(kind, select):
    take = select if callable(select) else lambda x: x[select]
    mask = torch.zeros(4, 6, 8)
    take(mask).fill_(1.0) if not isinstance(select, Tensor) else mask.index_fill_(0, select, 1.0)
    plain, given = net(), []
    torch_hook(plain, "layers.0.mlp", kind, lambda x: torch.where(mask == 1, x * 3, x))
    fm, seen = FlexModel(net()), []
    torch_hook(fm.module, "layers.0.mlp", kind, keep(seen))
    with fm.edit("layers.0.mlp", lambda x: (keep(given)(x), x * 3)[1], hook_type=kind, select=select):
        assert torch.equal(step(fm), step(plain))
    assert torch.equal(given[0], take(seen[0]))
    assert all(
        torch.allclose(p.grad, q.grad, atol=1e-7) for p, q in zip(fm.parameters(), plain.parameters(), strict=True)
    )


def noise(x: Tensor) -> Tensor:
    return x + torch.randn_like(x)


def test_random_edits_replay_and_leave_the_global_generator_alone():
    fm = FlexModel(net())
    state = torch.get_rng_state()
    with fm.edit("layers.*", noise, random=True):
        first, second = fm(tokens()), fm(tokens())
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, second)  # another call, other numbers
    torch.manual_seed(99)
    again = FlexModel(net())
    with again.edit("layers.*", noise, random=True):
        assert torch.equal(again(tokens()), first) and torch.equal(again(tokens()), second)
    other = FlexModel(net())
    other.seed = 1
    with other.edit("layers.*", noise, random=True):
        assert not torch.equal(other(tokens()), first)


def test_random_edits_differ_between_sites_and_do_not_change_dropout():
    model = nn.Sequential(nn.Identity(), nn.Identity(), nn.Dropout(0.5))
    fm, drawn, x = FlexModel(model), [], torch.ones(4, 8)
    with fm.edit(["0", "1"], lambda x: (drawn.append(torch.randn(3)), x)[1], random=True):
        torch.manual_seed(5)
        out = fm(x)
    torch.manual_seed(5)
    assert torch.equal(out, nn.functional.dropout(x, 0.5))
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_handle_takes_its_hook_off(kind):
    fm = FlexModel(net(), {})
    first = register(fm, kind, HookFunction(PLACE[kind], editing_function=lambda x: x * 2))
    second = register(fm, kind, HookFunction(PLACE[kind]))
    first.remove()
    first.remove()
    plain = net()
    assert torch.equal(step(fm), step(plain)) and same_gradients(fm.module, plain)
    assert len(fm.output_ptr[PLACE[kind]]) == 1
    second.remove()
    assert installed(fm.module) == 0 and fm.hooks() == []
    step(fm)
    assert len(fm.output_ptr[PLACE[kind]]) == 1


def test_a_handle_is_a_context():
    fm = FlexModel(net(), {})
    with fm.register_forward_hook(HookFunction("head")):
        fm(tokens())
    fm(tokens())
    assert len(fm.output_ptr["head"]) == 1 and installed(fm.module) == 0


def test_a_removed_hook_can_be_registered_again():
    fm, hook = FlexModel(net(), {}), HookFunction("head")
    fm.register_forward_hook(hook).remove()
    fm.register_forward_pre_hook(hook)
    fm(tokens())
    assert [v.shape for values in fm.output_ptr.values() for v in values] == [(4, 6, 8)]


@pytest.mark.parametrize("others", [True, False])
def test_a_hook_that_removes_itself(others):
    fm, runs = FlexModel(net(), {}), []

    def once(x: Tensor) -> Tensor:
        runs.append(1)
        handle.remove()
        return x * 2

    if others:
        fm.register_forward_hook(HookFunction("emb"))
        fm.register_forward_hook(HookFunction("head"))
    handle = fm.register_forward_hook(HookFunction("layers.0.mlp", editing_function=once))
    plain, seen = net(), []
    expected = plain(tokens())
    own = torch_hook(plain, "layers.0.mlp", "forward", lambda x: (keep(seen)(x), x * 2)[1])
    edited = plain(tokens())
    own.remove()
    assert torch.equal(fm(tokens()), edited)
    assert torch.equal(fm(tokens()), expected)
    assert len(runs) == 1
    assert [torch.equal(a, b) for a, b in zip(fm.output_ptr["layers.0.mlp"], seen, strict=True)] == [True]
    if others:
        assert torch.equal(fm.output_ptr["head"][0], edited) and torch.equal(fm.output_ptr["head"][1], expected)
        assert len(fm.output_ptr["emb"]) == 2
    else:
        assert installed(fm.module) == 0


def test_an_edit_that_registers_another_hook():
    fm, done = FlexModel(net(), {}), []

    def late(x: Tensor) -> None:
        if not done:
            done.append(fm.register_forward_hook(HookFunction("head")))

    fm.register_forward_hook(HookFunction("emb", editing_function=late))
    outs = [fm(tokens()) for _ in range(2)]
    assert len(fm.output_ptr["emb"]) == 2
    assert torch.equal(fm.output_ptr["head"][-1], outs[-1])


def test_what_an_edit_may_ask_for():
    told = []

    def edit(current_module, inputs, save_ctx, modules, *, site, call):
        told.append((current_module, site, call.index, call.phase, set(modules.keys())))

    model = net()
    fm = FlexModel(model)
    fm.register_trainable_module("probe", nn.Linear(1, 1))
    fm.register_forward_hook(HookFunction("head", editing_function=edit))
    fm(tokens()), fm(tokens())
    assert told == [(model.head, Site("head", "forward", 0), i, "prefill", {"probe"}) for i in range(2)]


def test_save_ctx_carries_values_and_their_graph_to_later_hooks():
    def first(module, x, save_ctx, modules):
        save_ctx.early = x

    def second(module, x, save_ctx, modules):
        return x + save_ctx.early

    fm, plain, kept = FlexModel(net()), net(), {}
    fm.register_forward_hook(HookFunction("layers.0", editing_function=first))
    fm.register_forward_hook(HookFunction("norm", editing_function=second))
    plain.layers[0].register_forward_hook(lambda m, a, out: kept.update(early=out))
    plain.norm.register_forward_hook(lambda m, a, out: out + kept["early"])
    assert torch.equal(step(fm), step(plain)) and same_gradients(fm.module, plain)
    with pytest.raises(AttributeError, match="later"):
        _ = fm.save_ctx.later


def test_an_auxiliary_loss_leaves_by_save_ctx():
    def edit(module, x, save_ctx, modules):
        save_ctx.loss = x.pow(2).mean()

    fm, plain, kept = FlexModel(net()), net(), {}
    fm.register_forward_hook(HookFunction("layers.0.mlp", editing_function=edit))
    plain.layers[0].mlp.register_forward_hook(lambda m, a, out: kept.update(loss=out.pow(2).mean()))
    (fm(tokens()).mean() + fm.save_ctx.loss).backward()
    (plain(tokens()).mean() + kept["loss"]).backward()
    assert same_gradients(fm.module, plain)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.relu, self.b = nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.relu(self.a(x)))


def test_in_place_modules_with_backward_hooks():
    x, plain = torch.randn(4, 8), InPlace()
    a = plain.a(x)
    a.retain_grad()
    z = a.relu()
    z.retain_grad()
    plain.b(z).pow(2).sum().backward()
    fm = FlexModel(InPlace(), {})
    kinds = ("forward_pre", "forward", "full_backward", "full_backward_pre")
    for kind in kinds:
        register(fm, kind, HookFunction("relu"))
    fm(x).pow(2).sum().backward()
    expected = dict(zip(kinds, (a, z, a.grad, z.grad), strict=True))
    for kind in kinds:
        key = "relu" if kind == "forward_pre" else Site("relu", kind, 0)
        assert torch.equal(fm.output_ptr[key][0], expected[kind]), kind
    assert same_gradients(fm.module, plain)


def test_nothing_is_installed_when_no_hook_is_enabled():
    fm = FlexModel(net())
    assert installed(fm.module) == 0
    fm.register_forward_hook(HookFunction("head"))
    assert installed(fm.module) > 0
    with fm.groups("all", complement=True):
        assert installed(fm.module) == 0
    with fm.capture("norm"), fm.edit("emb", lambda x: x):
        pass
    fm.restore()
    assert installed(fm.module) == 0


def test_restore_takes_off_disabled_and_temporary_hooks_too():
    model = net()
    fm = FlexModel(model, {})
    for kind, name in PLACE.items():
        register(fm, kind, HookFunction(name))
    fm.update_hook_groups(fm.get_group_hook_functions("all")[0], "one")
    with fm.groups("one"), fm.capture("head"):
        assert fm.restore() is model
        assert installed(model) == 0
    assert installed(model) == 0 and fm.hooks() == []
    fm(tokens())
    assert fm.output_ptr == {}
    assert fm.restore() is model


def test_a_wrapper_that_is_dropped_takes_its_hooks_along():
    model = net()
    fm = FlexModel(model)
    fm.register_forward_hook(HookFunction("head"))
    with fm.groups("all", complement=True):
        fm(tokens())
    del fm
    gc.collect()
    assert installed(model) == 0


def test_the_users_own_hooks_stay():
    model, seen = net(), []
    model.head.register_forward_hook(lambda m, a, out: keep(seen)(out))
    fm = FlexModel(model)
    fm.register_forward_hook(HookFunction("head", editing_function=lambda x: x * 2))
    fm(tokens())
    fm.restore()
    model(tokens())
    assert installed(model) == 1 and len(seen) == 2


@pytest.mark.parametrize("name", ["layers.1", "head", ""])
@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_an_exception_in_an_edit_leaves_nothing_behind(kind, name):
    def fail(x: Tensor) -> Tensor:
        raise ZeroDivisionError

    fm = FlexModel(net(), {})
    fm.register_forward_hook(HookFunction("layers.0"))
    expected = fm(tokens())
    fired = [row.fired for row in fm.hooks()]
    before = {k: len(v) for k, v in fm.output_ptr.items()}
    count = installed(fm.module)
    with pytest.raises(ZeroDivisionError), fm.edit(name, fail, hook_type=kind):
        fm(tokens())
    assert {k: len(v) for k, v in fm.output_ptr.items()} == before
    assert installed(fm.module) == count
    assert torch.equal(fm(tokens()), expected)
    assert len(fm.output_ptr["layers.0"]) == before["layers.0"] + 1
    assert fired == [1]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_the_model_leaves_nothing_behind(error):
    model = net()
    fm = FlexModel(model, {})
    fm.register_forward_hook(HookFunction("layers.0"))

    def fail(*_):
        raise error

    handle = model.layers[1].register_forward_hook(fail)
    with unchanged_but_fired(fm), pytest.raises(error):
        fm(tokens())
    with pytest.raises(error), fm.capture("layers.0") as acts:
        fm(tokens())
    assert list(acts) == []
    handle.remove()
    model.layers[0](torch.randn(1, 2, 8))  # a part called by itself is a call of its own
    assert len(fm.output_ptr["layers.0"]) == 1
    assert torch.equal(fm(tokens()), net()(tokens())) and len(fm.output_ptr["layers.0"]) == 2


def unchanged_but_fired(fm: FlexModel):
    """``unchanged``, where hooks may have met values of the failed call."""
    rows = fm.hooks
    fm.hooks = lambda: [(r.name, r.hook_type, r.groups, r.enabled) for r in rows()]  # type: ignore[method-assign]
    return unchanged(fm)


@pytest.mark.parametrize("kind", ["full_backward", "full_backward_pre", "tensor"])
def test_an_exception_in_a_backward_hook_leaves_nothing_behind(kind):
    fail = [True]

    def edit(grad: Tensor) -> None:
        if fail:
            raise ZeroDivisionError

    fm, plain, seen = FlexModel(net(), {}), net(), []
    register(fm, kind, HookFunction(PLACE[kind], editing_function=edit))
    fm.register_full_backward_pre_hook(HookFunction("head"))
    with pytest.raises(ZeroDivisionError):
        step(fm)
    assert not any(fm.output_ptr.values())
    fail.clear()
    fm.zero_grad()
    torch_hook(plain, "head", "full_backward_pre", keep(seen))
    step(fm), step(plain)
    assert same_gradients(fm.module, plain)
    assert [torch.equal(a, b) for a, b in zip(fm.output_ptr["head"], seen, strict=True)] == [True]
    assert len(fm.output_ptr[PLACE[kind]]) == 1


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_of_a_call_outlives_it(backward):
    fm, refs = FlexModel(net()), []

    def first(module, x, save_ctx, modules):
        save_ctx.x = x
        refs.append(weakref.ref(x))

    fm.register_forward_hook(HookFunction("layers.0.mlp", editing_function=first, capture=False))
    fm.register_forward_hook(HookFunction("layers.1.mlp", editing_function=lambda x: x * 2, capture=False))
    for _ in range(3):
        outs = [fm(tokens()), fm(tokens())]
        if backward:
            sum(out.sum() for out in outs).backward()
    del outs
    gc.collect()
    assert [r() is not None for r in refs] == [False] * 5 + [True]  # save_ctx has the last


def test_inputs_do_not_outlive_a_call():
    fm, x = FlexModel(nn.Sequential(nn.Identity())), torch.randn(3)
    with fm.capture("0"):
        fm(x)
    ref = weakref.ref(x)
    del x
    gc.collect()
    assert ref() is None


def _in_place(world: bool) -> None:
    ids = tokens().chunk(2)[dist.get_rank()] if world else tokens()
    plain = net()
    torch_hook(plain, "layers.0.norm", "forward_pre", lambda x: x * 2)
    fm = FlexModel(nn.parallel.DistributedDataParallel(net()) if world else net())
    with torch.no_grad(), fm.edit("layers.0.norm", lambda x: x.mul_(2), hook_type="forward_pre"):
        out = fm(ids)
    assert relative_error(out, plain(ids)) < 1e-5


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_edit_in_place_changes_what_its_module_gets_and_no_other_value(ranks):
    run_world(2, _in_place, True) if ranks == 2 else _in_place(False)


def test_hooks_tells_how_often_each_fired():
    fm = FlexModel(net(), {})
    fm.register_forward_hook(HookFunction("head", editing_function=lambda x: x))
    fm.register_full_backward_hook(HookFunction("norm"))
    fm.update_hook_groups("norm", "probes")
    step(fm)
    with torch.no_grad():
        fm(tokens())
    rows = [(r.name, r.hook_type, r.groups, r.enabled, r.fired, r.edits, r.run) for r in fm.hooks()]
    assert rows == [
        ("head", "forward", ("all",), True, 2, True, "every_rank"),
        ("norm", "full_backward", ("all", "probes"), True, 1, False, "every_rank"),
    ]


def test_sites_lists_both_sides_of_every_module_that_can_fire():
    fm = FlexModel(net())
    found = {(s.name, s.side, s.module) for s in fm.sites()}
    fire = [(n, type(m).__name__) for n, m in net().named_modules() if not isinstance(m, nn.ModuleList)]
    assert found == {(n, side, kind) for n, kind in fire for side in ("in", "out")}


@pytest.mark.parametrize("run", ["every_rank", "one_rank", "sharded"])
def test_the_run_modes_agree_on_one_process(run):
    plain = net()
    torch_hook(plain, "layers.0.mlp", "forward", lambda x: x.softmax(-1))
    fm = FlexModel(net(), {})
    fm.register_forward_hook(HookFunction("layers.0.mlp", editing_function=lambda x: x.softmax(-1), run=run))
    assert torch.equal(step(fm), step(plain)) and same_gradients(fm.module, plain)
