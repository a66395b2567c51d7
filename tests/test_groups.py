"""Groups of hooks: sets of tags, and which hooks a forward runs."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from functools import partial

import pytest
import torch
from conftest import installed, unchanged
from models import net, tokens
from torch import nn

from flex_model import FlexModel, HookFunction
from flex_model.core.hook_function import Site
from flex_model.errors import GroupError, NameNotFoundError, RegistrationError

PLACES = ("layers.0.mlp", "layers.1.mlp", "head")


@pytest.fixture
def model() -> FlexModel:
    """Hooks on three places; ``a`` holds the first two, ``b`` the last two."""
    fm = FlexModel(net(), {})
    hooks = [HookFunction(name) for name in PLACES]
    for hook in hooks:
        fm.register_forward_hook(hook)
    fm.update_hook_groups(hooks[:2], "a")
    fm.update_hook_groups(hooks[1:], "b")
    return fm


def ran(fm: FlexModel, **choice) -> set[str]:
    fm.output_ptr.clear()
    fm(tokens(), **choice)
    return set(fm.output_ptr)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({}, PLACES),
        ({"groups": "all"}, PLACES),
        ({"groups": "a"}, PLACES[:2]),
        ({"groups": ["a"]}, PLACES[:2]),
        ({"groups": ["a", "b"]}, PLACES),
        ({"groups": []}, ()),
        ({"groups": "a", "complement": True}, PLACES[2:]),
        ({"groups": ["a", "b"], "complement": True}, ()),
        ({"complement": True}, ()),
        ({"groups": [], "complement": True}, PLACES),
    ],
)
def test_forward_runs_the_union_or_its_complement(model, choice, expected):
    assert ran(model, **choice) == set(expected)
    assert ran(model) == set(PLACES)  # the choice was for one call


def test_disabled_hooks_neither_capture_nor_edit_and_are_enabled_again(model):
    model.register_forward_hook(edit := HookFunction("norm", editing_function=lambda x: x * 0))
    model.update_hook_groups(edit, "edits")
    plain = net()(tokens())
    assert torch.equal(model(tokens(), groups="edits", complement=True), plain)
    assert torch.equal(model(tokens()), torch.zeros_like(plain))
    assert torch.equal(model(tokens(), groups=["a", "b"]), plain)
    assert torch.equal(model(tokens(), groups="edits"), torch.zeros_like(plain))


def test_groups_block_holds_for_whoever_calls_the_model(model):
    with model.groups("a"):
        model.output_ptr.clear()
        model.module(tokens())
        assert set(model.output_ptr) == set(PLACES[:2])
        with model.groups("a", complement=True):
            assert ran(model) == {"head"}
        assert ran(model) == set(PLACES[:2])
        assert [row.enabled for row in model.hooks()] == [True, True, False]
    assert ran(model) == set(PLACES)


def test_the_choice_ends_with_an_exception(model):
    with pytest.raises(ZeroDivisionError), model.groups("a"):
        raise ZeroDivisionError
    with pytest.raises(TypeError):
        model(groups="a")
    assert ran(model) == set(PLACES)


def test_no_hook_is_installed_when_the_choice_is_empty(model):
    seen = []
    model.module.norm.register_forward_hook(lambda *_: seen.append(installed(model.module)))
    model(tokens(), groups="all", complement=True)
    assert seen == [1]


@pytest.mark.parametrize("which", ["a list", "one", "a string"])
def test_update_and_remove_take_a_list_one_hook_or_a_string(model, which):
    hooks = model.get_group_hook_functions("all")
    chosen = {"a list": hooks[:2], "one": hooks[0], "a string": "mlp"}[which]
    expected = hooks[:1] if which == "one" else hooks[:2]
    model.update_hook_groups(chosen, "new")
    assert model.get_group_hook_functions("new") == expected
    assert all("new" in model.get_hook_function_groups(h) for h in expected)
    model.update_hook_groups(hooks[2], "new")
    model.remove_hook_groups(chosen, "new")
    assert model.get_group_hook_functions("new") == hooks[2:]
    assert ran(model, groups="new") == {"head"}


def test_tags_are_sets(model):
    hook = model.get_group_hook_functions("a")[0]
    for _ in range(2):
        model.update_hook_groups(hook, "a")
    assert model.get_hook_function_groups(hook) == {"all", "a"}
    model.remove_hook_groups(hook, "a")
    assert model.get_hook_function_groups(hook) == {"all"}
    assert ran(model, groups=["a", "b"]) == set(PLACES[1:])


def test_what_the_model_tells_of_groups_is_a_copy(model):
    hook = model.get_group_hook_functions("a")[0]
    model.get_hook_function_groups(hook).add("mine")
    model.get_group_hook_functions("a").clear()
    assert model.get_hook_function_groups(hook) == {"all", "a"}
    assert len(model.get_group_hook_functions("a")) == 2


def test_create_hook_group_hooks_every_module_with_the_string_in_its_name():
    fm = FlexModel(net(), {})
    fm.create_hook_group("mlps", "mlp", (None, None, None), lambda x: x * 2, 0)
    fm.register_forward_hook(HookFunction("head"))
    expected = [n for n, _ in net().named_modules() if "mlp" in n]
    assert [h.module_name for h in fm.get_group_hook_functions("mlps")] == expected
    plain, seen = net(), {}
    for name in expected:
        plain.get_submodule(name).register_forward_hook(
            lambda m, a, out, name=name: (seen.setdefault(name, out.detach().clone()), out * 2)[1]
        )
    out = fm(tokens(), groups="mlps")
    assert torch.equal(out, plain(tokens()))
    assert set(fm.output_ptr) == set(expected)
    assert all(torch.equal(fm.output_ptr[n][0], seen[n]) for n in expected)


def test_create_hook_group_takes_parameters_too():
    fm = FlexModel(net(), {})
    fm.create_hook_group("weights", "mlp.up", hook_type="tensor")
    plain = net()
    for model in (fm, plain):
        model(tokens()).pow(2).mean().backward()
    assert set(fm.output_ptr) == {"layers.0.mlp.up.weight", "layers.1.mlp.up.weight"}
    for name, (grad,) in fm.output_ptr.items():
        assert torch.equal(grad, plain.get_parameter(name).grad)


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (lambda fm, hook: fm(tokens(), groups="zzz"), "zzz"),
        (lambda fm, hook: fm(tokens(), groups=["a", "zzz"], complement=True), "zzz"),
        (lambda fm, hook: fm.groups("zzz").__enter__(), "zzz"),
        (lambda fm, hook: fm.get_group_hook_functions("zzz"), "zzz"),
        (lambda fm, hook: fm.remove_hook_groups(hook, "zzz"), "zzz"),
        (lambda fm, hook: fm.remove_hook_groups(hook, "all"), "all"),
        (lambda fm, hook: fm.remove_hook_groups("mlp", "all"), "all"),
        (lambda fm, hook: fm.update_hook_groups("zzz", "a"), "zzz"),
        (lambda fm, hook: fm.update_hook_groups([hook, HookFunction("norm")], "b"), "norm"),
        (lambda fm, hook: fm.get_hook_function_groups(HookFunction("norm")), "norm"),
    ],
)
def test_a_refused_change_of_groups_changes_nothing(model, act, named):
    hook = model.get_group_hook_functions("a")[0]
    with unchanged(model), pytest.raises(GroupError, match=named):
        act(model, hook)
    assert ran(model) == set(PLACES)
    assert ran(model, groups="a") == set(PLACES[:2])


def test_the_message_lists_the_groups_there_are(model):
    with pytest.raises(GroupError, match="a, all, b"):
        model(tokens(), groups="c")


def test_create_hook_group_that_matches_nothing_changes_nothing(model):
    with unchanged(model), pytest.raises(NameNotFoundError):
        model.create_hook_group("new", "zzz")
    with unchanged(model), pytest.raises(RegistrationError):
        model.create_hook_group("new", "mlp", editing_function=lambda a, b: a)
    with pytest.raises(GroupError):
        model.get_group_hook_functions("new")


def test_capture_and_edit_ignore_the_choice_of_groups(model):
    with (
        model.groups("a", complement=True),
        model.capture("layers.0.mlp") as acts,
        model.edit("norm", lambda x: x * 0),
    ):
        out = model(tokens(), groups="b")
    assert acts["layers.0.mlp"].shape == (4, 6, 8) and not out.any()


def test_a_removed_hook_leaves_its_groups(model):
    handle = model.register_forward_hook(HookFunction("norm"))
    model.update_hook_groups("norm", "new")
    handle.remove()
    with pytest.raises(GroupError):
        model(tokens(), groups="new")


# -- switched off and on ------------------------------------------------------------------------------------------
def _note(seen: list[object], number: int, x: torch.Tensor, *, site: Site) -> None:
    seen.append((site.name, number))


def test_a_group_that_comes_back_is_not_made_anew() -> None:
    """The same hooks are there again, in the order of registration, and none beside them."""
    model, seen = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), []
    fm = FlexModel(model, {})
    for number, name in enumerate(("0", "1", "0")):
        note = partial(_note, seen, number)
        fm.register_forward_hook(HookFunction(name, editing_function=note, capture=False))
    fm(torch.ones(1, 2))
    first, seen[:] = list(seen), []
    hooks = [dict(m._forward_hooks) for m in model.modules()]
    for _ in range(3):
        with fm.groups("all", complement=True):
            assert installed(model) == 0
            fm(torch.ones(1, 2))
    assert seen == [] and [list(m._forward_hooks.values()) for m in model] == [list(h.values()) for h in hooks[1:]]
    fm(torch.ones(1, 2))
    assert seen == first == [("0", 0), ("0", 2), ("1", 1)]


def test_what_was_kept_of_hooks_is_forgotten_with_them() -> None:
    model, output = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), {}
    fm = FlexModel(model, output)
    first, _ = (fm.register_forward_hook(HookFunction(n)) for n in "01")
    with fm.groups("all", complement=True):
        first.remove()
    fm(torch.ones(1, 2))
    assert list(output) == ["1"]
    fm.restore()
    assert installed(model) == 0 and not fm._runtime.installed.sets._kept


def test_hooks_are_made_anew_where_the_model_has_other_tables() -> None:
    model, output = nn.Sequential(nn.Linear(2, 2)), {}
    fm = FlexModel(model, output)
    fm.register_forward_hook(HookFunction("0"))
    with fm.groups("all", complement=True):
        model[0]._forward_hooks = OrderedDict()
    fm(torch.ones(1, 2))
    assert len(output["0"]) == 1


def test_a_block_leaves_nothing_behind() -> None:
    """What a block has captured is gone with what it gave."""
    model = nn.Sequential(nn.Linear(2, 2))
    fm = FlexModel(model)
    gc.collect()
    gc.disable()
    try:
        for backward in (False, True):
            with fm.capture("0") as acts:
                loss = fm(torch.ones(1, 2)).sum()
                _ = loss.backward() if backward else None
            gone = weakref.ref(acts["0"])
            del acts
            assert gone() is None
    finally:
        gc.enable()
