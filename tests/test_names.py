"""Names are the plain model's, whatever wraps it; patterns are globs over them."""

from __future__ import annotations

import pytest
import torch
from models import Block, net, tokens
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel as DDP
from worlds import run_world

from flex_model import FlexModel, HookFunction
from flex_model.core.naming.globs import glob_to_regex
from flex_model.core.naming.names import Names
from flex_model.errors import NameNotFoundError, RegistrationError

PLAIN = [n for n, _ in net().named_modules()]
PARAMETERS = [n for n, _ in net().named_parameters()]


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        (
            "layers.*.mlp",
            ["layers.0.mlp", "layers.11.mlp"],
            ["layers.0.mlp.up", "layers.0.1.mlp", "layers.0"],
        ),
        ("layers.**", ["layers.0", "layers.0.mlp.up"], ["layers", "head"]),
        ("**.up", ["layers.0.mlp.up"], ["up", "layers.0.mlp.upper"]),
        ("layers.[01].mlp", ["layers.0.mlp", "layers.1.mlp"], ["layers.2.mlp"]),
        ("layers.[!0].mlp", ["layers.1.mlp"], ["layers.0.mlp"]),
        ("layers.?", ["layers.0"], ["layers.10", "layers."]),
        ("a.b", ["a.b"], ["axb"]),
        ("[]*$", ["[]$", "[]a$"], ["[", "[]"]),
        ("[!]a]", ["[!]a]"], ["ba"]),
        ("[a\\]", ["a", "\\"], ["a]"]),
    ],
)
def test_globs(pattern, yes, no):
    regex = glob_to_regex(pattern)
    assert all(regex.fullmatch(n) for n in yes)
    assert not any(regex.fullmatch(n) for n in no)


def test_a_set_that_runs_backwards_is_refused():
    with pytest.raises(RegistrationError, match=r"expected a pattern such as .* got 'layers.\[9-0\]'"):
        Names(net()).match("layers.[9-0]")


def test_patterns_choose_modules_in_the_models_order():
    names = Names(net())
    assert names.match("layers.*.mlp") == [("layers.0.mlp",) * 2, ("layers.1.mlp",) * 2]
    assert names.match(["head", "layers.[1].mlp"]) == [("head", "head"), ("layers.1.mlp",) * 2]
    assert [n for n, _ in names.match(lambda n: n.endswith("norm"))] == [
        "layers.0.norm",
        "layers.1.norm",
        "norm",
    ]
    assert [n for n, _ in names.match("**")] == [n for n in PLAIN[1:] if n != "layers"]  # it never fires
    assert [n for n, _ in names.match("*.weight", of="parameter")] == [
        "emb.weight",
        "norm.weight",
        "head.weight",
    ]


def wrap(how: str) -> nn.Module:
    model = net()
    if how == "compiled":
        return torch.compile(model)
    if how == "checkpointed":
        for i, layer in enumerate(model.layers):
            model.layers[i] = checkpoint_wrapper(layer)
        return model
    if how == "ddp":
        return DDP(model)
    if how == "ddp of compiled":
        return DDP(torch.compile(model))
    return FSDP(model, auto_wrap_policy=ModuleWrapPolicy({Block}), use_orig_params=True, device_id=torch.device("cpu"))


def _names_under(how: str) -> None:
    wrapped = wrap(how)
    raw = [n for n, _ in wrapped.named_modules()]
    fm = FlexModel(wrapped)
    assert fm.wrapped_module_names == PLAIN
    assert [n for n, _ in fm.named_parameters()] == PARAMETERS
    names = fm._runtime.names
    assert {names.clean(n) for n in raw} == set(PLAIN)
    assert all(names.clean(n) == names.clean(f"module.{n}") == n for n in PLAIN if n)
    assert names.clean("_fsdp_wrapped_module.layers.0._checkpoint_wrapped_module.mlp") == "layers.0.mlp"
    assert names.modules["layers.0.mlp.up"] is next(m for n, m in wrapped.named_modules() if n.endswith("mlp.up"))


@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
def test_wrappers_leave_no_trace_in_names(how):
    _names_under(how)


@pytest.mark.parametrize("how", ["ddp", "ddp of compiled", "fsdp"])
def test_engines_leave_no_trace_in_names(how):
    run_world(1, _names_under, how)


def test_a_child_that_is_really_called_module_keeps_its_name():
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 3)

        def forward(self, x):
            return self.module(x)

    plain = Holder()
    fm = FlexModel(plain)
    assert fm.wrapped_module_names == ["", "module"]
    assert [n for n, _ in fm.named_parameters()] == ["module.weight", "module.bias"]
    assert list(fm.state_dict()) == ["module.weight", "module.bias"]
    with fm.capture("module") as acts:
        out = fm(torch.ones(1, 2))
    assert torch.equal(acts["module"], out)


def test_keys_are_spelled_as_the_user_spelled_them():
    fm = FlexModel(net(), {})
    fm.register_forward_hook(HookFunction("module.head"))
    with fm.capture("_orig_mod.norm", "layers.*") as acts:
        fm(tokens())
    assert list(fm.output_ptr) == ["module.head"]
    assert set(acts) == {"layers.0", "layers.1", "_orig_mod.norm"}


def test_the_root_is_hooked_by_the_empty_name():
    fm = FlexModel(net(), {})
    with fm.capture("") as acts:
        out = fm(tokens())
    assert torch.equal(acts[""], out)


@pytest.mark.parametrize("name", ["layers.0.mpl", "layers.*.mpl", ["head", "layers.0.mpl"]])
def test_an_unknown_name_tells_the_closest(name):
    fm = FlexModel(net())
    with pytest.raises(NameNotFoundError, match=r"mpl.*layers\.\d\.mlp"), fm.capture(name):
        raise AssertionError("the block must not be entered")
    assert fm.hooks() == []


def test_lists_of_names():
    fm = FlexModel(net())
    fm.register_trainable_module("probe", nn.Linear(2, 2))
    assert fm.trainable_modules_names == ["probe"]
    assert fm.all_modules_names == [*PLAIN, "probe"]
    assert [n for n, _ in fm.named_parameters()] == [
        *PARAMETERS,
        "trainable_modules.probe.weight",
        "trainable_modules.probe.bias",
    ]
    fm.module.register_buffer("scale", torch.ones(1))
    assert [n for n, _ in fm.named_buffers()] == ["scale"]


def test_get_module_parameter():
    model = net()
    fm = FlexModel(model)
    value = fm.get_module_parameter("module.layers.0.mlp.up.weight", (16, None))
    assert torch.equal(value, model.layers[0].mlp.up.weight) and not value.requires_grad
    value.zero_()
    assert model.layers[0].mlp.up.weight.any()
    with pytest.raises(NameNotFoundError, match=r"layers\.0\.mlp\.up\.weight"):
        fm.get_module_parameter("layers.0.mlp.up.wieght")
