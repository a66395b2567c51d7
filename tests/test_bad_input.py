"""What is refused: the right class, a message that names module and expectation, and nothing changed."""

from __future__ import annotations

import pickle
from functools import partial

import pytest
import torch
import torch.distributed as dist
from conftest import REGISTER, unchanged
from models import net, tokens
from torch import nn
from torch.distributed.tensor import Shard
from worlds import run_world

from flex_model import FlexModel, HookFunction
from flex_model.errors import (
    DeliveryError,
    EditError,
    FlexModelError,
    GroupError,
    LayoutError,
    MeshError,
    NameNotFoundError,
    RegistrationError,
    ShapeError,
)

NAME = "layers.0.mlp"


@pytest.fixture
def fm() -> FlexModel:
    """One hook that has captured once."""
    model = FlexModel(net(), {})
    model.register_forward_hook(HookFunction("head"))
    model(tokens())
    return model


def forward(fm, name, **keywords):
    fm.register_forward_hook(HookFunction(name, **keywords))


def captured(fm, *patterns, **keywords):
    with fm.capture(*patterns, **keywords):
        raise AssertionError("the block must not be entered")


def edited(fm, pattern, fn, **keywords):
    with fm.edit(pattern, fn, **keywords):
        raise AssertionError("the block must not be entered")


def no_arguments():
    return None


def three(module, x, save_ctx):
    return x


def five(module, x, save_ctx, modules, more):
    return x


REFUSED = {
    "module": (
        lambda fm: forward(fm, "layers.0.mpl"),
        NameNotFoundError,
        r"'layers\.0\.mpl'.*'layers\.0\.mlp'",
    ),
    "pre": (
        lambda fm: fm.register_forward_pre_hook(HookFunction("haed")),
        NameNotFoundError,
        "'haed'.*'head'",
    ),
    "parameter": (
        lambda fm: fm.register_hook(HookFunction("head.wieght")),
        NameNotFoundError,
        r"'head\.wieght'.*'head\.weight'",
    ),
    "module for parameter": (
        lambda fm: fm.register_hook(HookFunction("head")),
        NameNotFoundError,
        r"'head'.*'head\.weight'",
    ),
    "pattern": (
        lambda fm: captured(fm, "layers.*.mpl"),
        NameNotFoundError,
        r"'layers\.\*\.mpl'.*'layers\.0\.mlp'",
    ),
    "list": (lambda fm: captured(fm, ["head", "nrom"]), NameNotFoundError, "'nrom'.*'norm'"),
    "predicate": (lambda fm: captured(fm, lambda n: False), NameNotFoundError, "predicate"),
    "edit pattern": (
        lambda fm: edited(fm, "layer.*", lambda x: x),
        NameNotFoundError,
        r"'layer\.\*'.*'layers\.[01]'",
    ),
    "no pattern": (captured, RegistrationError, r"\*\*"),
    "hook type": (lambda fm: captured(fm, "head", hook_type="fwd"), RegistrationError, "'fwd'.*forward_pre"),
    "deliver": (
        lambda fm: captured(fm, "head", deliver="some"),
        RegistrationError,
        "'some'.*'main', 'all' or 'local'",
    ),
    "backward with grad": (
        lambda fm: captured(fm, "head", hook_type="full_backward", grad=True),
        RegistrationError,
        "full_backward",
    ),
    "detach and deliver": (
        lambda fm: captured(fm, "head", detach=False, deliver="main"),
        RegistrationError,
        "deliver='all'",
    ),
    "no arguments": (
        lambda fm: forward(fm, NAME, editing_function=no_arguments),
        RegistrationError,
        rf"{NAME}.*takes 0",
    ),
    "three arguments": (
        lambda fm: forward(fm, NAME, editing_function=three),
        RegistrationError,
        rf"{NAME}.*module, x, save_ctx",
    ),
    "five arguments": (lambda fm: edited(fm, NAME, five), RegistrationError, rf"{NAME}.*takes 5.*fn\(x\)"),
    "no function": (
        lambda fm: forward(fm, NAME, editing_function=3),
        RegistrationError,
        rf"{NAME}.*callable",
    ),
    "no name": (lambda fm: forward(fm, 3), RegistrationError, "string.*int"),
    "run": (lambda fm: forward(fm, NAME, run="twice"), RegistrationError, rf"{NAME}.*'twice'.*'every_rank'"),
    "expected_shape": (
        lambda fm: forward(fm, NAME, expected_shape=(None, -1)),
        RegistrationError,
        rf"{NAME}.*None a dim",
    ),
    "expected_shape as number": (
        lambda fm: forward(fm, NAME, expected_shape=8),
        RegistrationError,
        f"{NAME}.*8",
    ),
    "layout": (lambda fm: forward(fm, NAME, layout="rows"), LayoutError, rf"{NAME}.*'rows'.*Shard"),
    "placement": (lambda fm: forward(fm, NAME, layout={"tp": 2}), LayoutError, f"{NAME}.*2"),
    "trainable module": (
        lambda fm: fm.register_trainable_module("p", lambda x: x),
        RegistrationError,
        "'p'.*nn.Module",
    ),
    "unknown group": (lambda fm: fm(tokens(), groups="zzz"), GroupError, "'zzz'.*all"),
    "parameter name": (
        lambda fm: fm.get_module_parameter("nrom.weight"),
        NameNotFoundError,
        r"'norm\.weight'",
    ),
    "parameter shape": (
        lambda fm: fm.get_module_parameter("norm.weight", (9,)),
        ShapeError,
        r"norm\.weight.*\(9,\).*\(8,\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(fm, case):
    act, error, message = REFUSED[case]
    with unchanged(fm), pytest.raises(error, match=f"(?s){message}") as caught:
        act(fm)
    assert isinstance(caught.value, FlexModelError) and "\\n" not in str(caught.value)
    fm(tokens())
    assert len(fm.output_ptr["head"]) == 2


def test_second_registration(fm):
    hook = HookFunction(NAME)
    fm.register_forward_hook(hook)
    for register in REGISTER.values():
        with unchanged(fm), pytest.raises(RegistrationError, match=rf"{NAME}.*registered already"):
            getattr(fm, register)(hook)


def test_second_trainable_module_of_a_name(fm):
    first = nn.Linear(1, 1)
    fm.register_trainable_module("p", first)
    with unchanged(fm), pytest.raises(RegistrationError, match="'p' is registered already"):
        fm.register_trainable_module("p", nn.Linear(1, 1))
    assert fm.trainable_modules["p"] is first


def test_a_frozen_parameter_never_has_a_gradient(fm):
    fm.module.head.weight.requires_grad_(False)
    with unchanged(fm), pytest.raises(RegistrationError, match=r"head\.weight.*gradient"):
        fm.register_hook(HookFunction("head.weight"))


def test_a_failed_registration_does_not_take_the_key(fm):
    with pytest.raises(RegistrationError):
        fm.register_forward_pre_hook(HookFunction(NAME, editing_function=three))
    fm.register_forward_hook(HookFunction(NAME))
    fm(tokens())
    assert set(fm.output_ptr) == {"head", NAME}


def test_a_failed_registration_leaves_the_hook_usable(fm):
    hook = HookFunction("haed")
    with pytest.raises(NameNotFoundError):
        fm.register_forward_hook(hook)
    hook.module_name = "norm"
    fm.register_forward_hook(hook)
    fm(tokens())
    assert len(fm.output_ptr["norm"]) == 1


ANSWERS = {
    "shape": (lambda x: x[..., :3], r"\(4, 6, 3\).*\(4, 6, 8\)"),
    "dims": (lambda x: x.sum(), r"\(\).*\(4, 6, 8\)"),
    "dtype": (lambda x: x.double(), r"torch\.float64.*torch\.float32"),
    "type": (lambda x: (x, x), "tuple.*tensor or None"),
    "number": (lambda x: 3.0, "float.*tensor or None"),
}


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("case", ANSWERS)
def test_wrong_answers_of_an_edit(fm, case, kind, capture):
    edit, message = ANSWERS[case]
    handle = getattr(fm, REGISTER[kind])(HookFunction(NAME, editing_function=edit, capture=capture))
    captured_before = [id(v) for v in fm.output_ptr["head"]]
    backward = kind.startswith("full")
    with pytest.raises(ShapeError, match=rf"(?s)layers\.0\.mlp \({kind}\).*{message}"):
        fm(tokens()).sum().backward()
    assert [id(v) for v in fm.output_ptr["head"]][:1] == captured_before
    assert len(fm.output_ptr["head"]) == (2 if backward else 1) and NAME not in fm.output_ptr
    handle.remove()
    assert torch.equal(fm(tokens()), net()(tokens()))


def test_wrong_answer_for_a_selection(fm):
    first = (slice(None), slice(None), 0)
    told = pytest.raises(ShapeError, match=r"layers\.0\.mlp.*\(4, 6, 1\).*\(4, 6\)")
    with fm.edit(NAME, lambda x: x[..., None], select=first), told:
        fm(tokens())


@pytest.mark.parametrize("shape", [(None, None, 9), (4, 6), (3, None, None)])
@pytest.mark.parametrize("edit", [None, lambda x: x * 2])
def test_wrong_expected_shape(fm, shape, edit):
    handle = fm.register_forward_hook(HookFunction(NAME, shape, edit))
    other = fm.register_forward_hook(HookFunction("norm"))
    with pytest.raises(ShapeError) as caught:
        fm(tokens())
    assert "layers.0.mlp" in str(caught.value) and str(shape) in str(caught.value) and "(4, 6, 8)" in str(caught.value)
    assert {k: len(v) for k, v in fm.output_ptr.items()} == {"head": 1}
    handle.remove(), other.remove()
    assert torch.equal(fm(tokens()), net()(tokens()))
    assert len(fm.output_ptr["head"]) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2.*has 1"),
        ({"data_parallel_size": 4}, "data_parallel_size=4.*has 1"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2.*has 1"),
    ],
)
def test_contradictory_sizes(given, message):
    model = net()
    with pytest.raises(MeshError, match=message):
        FlexModel(model, **given)
    FlexModel(model, tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_size=1)


def _contradiction_under_ddp() -> None:
    ddp = nn.parallel.DistributedDataParallel(net())
    for given in ({"data_parallel_size": 4}, {"data_parallel_size": 1}, {"tensor_parallel_size": 2}):
        with pytest.raises(MeshError, match="DDP"):
            FlexModel(ddp, **given)
    fm = FlexModel(ddp, data_parallel_size=2, tensor_parallel_size=1)
    with unchanged(fm), pytest.raises(LayoutError, match=r"layers\.0\.mlp.*'zz'.*'dp'"):
        fm.register_forward_hook(HookFunction(NAME, layout={"zz": Shard(0)}))
    with unchanged(fm), pytest.raises(LayoutError, match=r"layers\.0\.mlp.*2 placements.*1 axes"):
        fm.register_forward_hook(HookFunction(NAME, layout=[Shard(0), Shard(1)]))
    with unchanged(fm), pytest.raises(FlexModelError, match="zz"):
        fm.register_forward_hook(HookFunction(NAME, axes=("zz",)))


def test_contradictions_under_ddp():
    run_world(2, _contradiction_under_ddp)


def _errors_on_every_rank(expected_shape: tuple[int | None, ...]) -> None:
    fm = FlexModel(nn.parallel.DistributedDataParallel(net()), {})
    handle = fm.register_forward_hook(HookFunction(NAME, expected_shape))
    mine = tokens().chunk(2)[dist.get_rank()]
    with pytest.raises(ShapeError, match=r"layers\.0\.mlp.*\(4, 6, 8\)"):
        fm(mine)
    assert not any(fm.output_ptr.values())
    handle.remove()
    with pytest.raises(FlexModelError, match=r"layers\.0\.mlp.*shape"), fm.edit(NAME, lambda x: x[..., :3]):
        fm(mine)
    with fm.capture(NAME) as acts:
        fm(mine)
    assert acts[NAME].shape == (4, 6, 8)


@pytest.mark.parametrize("shape", [(2, 6, 8), (None, None, 16), (None, None)])
def test_wrong_shapes_are_told_on_every_rank(shape):
    run_world(2, partial(_errors_on_every_rank, shape))


def test_errors_are_also_the_builtin_kind():
    for error, kind in (
        (NameNotFoundError, KeyError),
        (GroupError, KeyError),
        (DeliveryError, KeyError),
        (RegistrationError, ValueError),
        (MeshError, ValueError),
        (ShapeError, ValueError),
        (LayoutError, RuntimeError),
        (EditError, RuntimeError),
    ):
        assert issubclass(error, kind) and issubclass(error, FlexModelError)
        said = pickle.loads(pickle.dumps(error("a 'message'", page="other")))
        assert (said.message, said.page, said.args) == ("a 'message'", "other", ("a 'message'",))
        assert str(error("a 'message'")) == f"a 'message' (docs/errors/{error.page}.md)"
