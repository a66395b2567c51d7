"""Modules and parameters with several names, modules that run several times, and modules that give no tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import engines
import models
import parity
import pytest
import torch
import torch.distributed as dist
from conftest import REGISTER, torch_hook
from oracle import relative_error
from test_edits_gradients import mix, mix_gradient
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from worlds import run_world

from flex_model import FlexModel, HookFunction
from flex_model.core.naming.names import Names
from flex_model.errors import DeliveryError, RegistrationError

# What torch cannot run itself, and why.
CANNOT = "FSDP1's auto_wrap_policy wraps a shared block in its first place only, and the model fails without any hook"

ENGINES = ("ddp", "fsdp1", "fsdp1_orig", "fsdp2", "tp")


class Tied(models.Net):
    """The first block is the last one, too; the head's weight is the embedding's; the norm runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers.append(self.layers[0])
        self.head.weight = self.emb.weight
        self.last = self.norm

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + 0.5 * self.head(self.last(self.emb(ids)))


def tied() -> Tied:
    torch.manual_seed(0)
    return Tied()


def place(engine: str) -> engines.Placed:
    model = tied()
    if engine == "fsdp1_orig":  # without a policy: see CANNOT
        wrapped = FullyShardedDataParallel(model, device_id=torch.device(engines.device), use_orig_params=True)
        return engines.Placed(wrapped, dist.get_world_size(), dist.get_rank())
    if engine != "tp":
        return engines.place(engine, model)
    plan: dict[str, Any] = {
        "emb": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    for i in (0, 1):  # the third is the first
        plan |= {f"layers.{i}.mlp.up": ColwiseParallel(), f"layers.{i}.mlp.down": RowwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), plan)
    model.head.weight = model.emb.weight  # it makes new parameters of both
    return engines.Placed(model)


# -- names ---------------------------------------------------------------------------------------------------------
def test_every_name_is_a_name() -> None:
    fm = FlexModel(tied())
    assert fm.wrapped_module_names == [n for n, _ in tied().named_modules(remove_duplicate=False)]
    assert list(fm.state_dict()) == list(tied().state_dict())
    assert [n for n, _ in fm.named_parameters()] == [n for n, _ in tied().named_parameters()]
    rows = {r.name: r.same_as for r in fm.sites()}
    assert rows["last"] == "norm" and rows["layers.2.mlp.act"] == "layers.0.mlp.act" and not rows["norm"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("layers.*", ["layers.0", "layers.1"]),
        ("layers.2*", ["layers.2"]),
        ("layers.[12].mlp", ["layers.1.mlp", "layers.2.mlp"]),
        (lambda n: n in ("norm", "last"), ["norm"]),
        (["norm", "last"], ["norm", "last"]),
    ],
)
def test_a_pattern_takes_a_module_once_by_the_first_name_that_matches(pattern: Any, found: list[str]) -> None:
    assert [n for n, _ in Names(tied()).match(pattern)] == found


def test_a_pattern_takes_a_parameter_once() -> None:
    names = Names(tied())
    assert [n for n, _ in names.match("*.weight", of="parameter")] == ["emb.weight", "norm.weight"]
    assert [n for n, _ in names.match("head.*", of="parameter")] == ["head.weight"]


def test_captured_by_a_glob_and_found_by_any_name() -> None:
    fm = FlexModel(tied())
    with fm.capture("**") as acts:
        fm(models.tokens())
    assert "last" not in list(acts) and len(acts.calls("norm")) == 2
    assert all(a is b for a, b in zip(acts.calls("last"), acts.calls("norm"), strict=True))
    assert len(acts.calls("layers.2.mlp.up")) == 2


def test_captured_by_both_names() -> None:
    fm = FlexModel(tied(), {})
    for name in ("norm", "last"):
        fm.register_forward_hook(HookFunction(name))
    with fm.capture("last", "norm") as acts:
        fm(models.tokens())
    for found in (acts.calls("norm"), acts.calls("last"), fm.output_ptr["last"]):
        assert len(found) == 2
        assert all(torch.equal(a, b) for a, b in zip(found, fm.output_ptr["norm"], strict=True))
    assert [(h.name, h.fired) for h in fm.hooks()] == [("norm", 2), ("last", 2)]


@pytest.mark.parametrize("pattern", ["**", ["norm", "last"], lambda n: n in ("norm", "last"), "last"])
def test_an_edit_runs_once_a_firing(pattern: Any) -> None:
    fm, seen = FlexModel(tied()), []

    def count(module: nn.Module, x: Tensor, save_ctx: object, modules: nn.ModuleDict) -> None:
        if module is fm.module.norm:
            seen.append(x)

    with fm.edit(pattern, count):
        fm(models.tokens())
    assert len(seen) == 2


# -- engines -------------------------------------------------------------------------------------------------------
def _parity(engine: str) -> tuple[str, list[str], int]:
    placed, full = place(engine), models.tokens()
    count = parity.compare(
        placed.model, tied(), lambda m: engines.loss(m(placed.mine(full))), lambda m: engines.loss(m(full))
    )
    return str(count), count.wrong + count.refused, count.tried


@pytest.mark.parametrize("engine", ENGINES)
def test_every_call(engine: str) -> None:
    for text, problems, tried in run_world(2, _parity, engine):
        print(f"tied/{engine}: {text}")
        assert not problems and tried == 62


def _fails_by_itself() -> None:
    placed = engines.place("fsdp1_orig", tied())
    placed.model(placed.mine(models.tokens()))


def test_what_torch_cannot_run() -> None:
    print(f"tied/fsdp1_orig with a policy: not run, {CANNOT}")
    with pytest.raises(AssertionError, match="Expected weight to be of same shape as normalized_shape"):
        run_world(2, _fails_by_itself)


PARAMETERS = [n for n, _ in tied().named_parameters(remove_duplicate=False)]


def _parameters(engine: str) -> list[str]:
    placed, plain, full, bad = place(engine), tied(), models.tokens(), []
    fm = FlexModel(placed.model, deliver="all")
    want: dict[str, list[Tensor]] = {n: [] for n in PARAMETERS}
    for name in PARAMETERS:
        if not torch.equal(fm.get_module_parameter(name), plain.get_parameter(name)):
            bad.append(f"the parameter {name}")
        plain.get_parameter(name).register_hook(lambda g, name=name: want[name].append(g.clone()))
        fm.register_hook(HookFunction(name))
    engines.loss(plain(full)).backward()
    engines.loss(fm(placed.mine(full))).backward()
    for name, values in want.items():
        got = fm.output_ptr.get(name, [])
        if len(got) != 1 or len(values) != 1 or relative_error(got[0], values[0]) > 1e-5:
            bad.append(f"the gradient of {name}")
    if [n for n, _ in fm._runtime.names.match("*.weight", of="parameter")] != ["emb.weight", "norm.weight"]:
        bad.append("the glob")
    return bad


@pytest.mark.parametrize("engine", ENGINES)
def test_parameters_by_all_their_names(engine: str) -> None:
    for bad in run_world(2, _parameters, engine):
        print(f"tied parameters/{engine}: {2 * len(PARAMETERS) - len(bad)} exact of {2 * len(PARAMETERS)}")
        assert not bad


SITES = ("layers.0.mlp.act", "layers.2.mlp.up", "layers.2", "last")


def _edited(engine: str) -> tuple[int, list[str]]:
    tried, bad = 0, []
    for site in SITES:
        for hook_type in parity.TYPES:
            plain, placed, full = tied(), place(engine), models.tokens()
            fn = mix_gradient if "backward" in hook_type else mix
            torch_hook(plain, site, hook_type, fn)
            expected = plain(full)
            engines.loss(expected).backward()
            fm = FlexModel(placed.model)
            parameters = dict(fm.named_parameters())
            getattr(fm, REGISTER[hook_type])(HookFunction(site, editing_function=fn, capture=False))
            output = fm(placed.mine(full))
            engines.loss(output).backward()
            found = parity.wrong_gradients(fm, plain, parameters)
            if relative_error(fm.full_output(output), expected) > 1e-5:
                found.append("the output")
            tried += 1
            bad += [f"{site} {hook_type}: {found[:3]}"] if found else []
    return tried, bad


@pytest.mark.parametrize("engine", ENGINES)
def test_edits_in_every_call(engine: str) -> None:
    for tried, bad in run_world(2, _edited, engine):
        print(f"tied, edits/{engine}: {tried - len(bad)} exact of {tried}")
        assert not bad and tried == 16


# -- recursion -----------------------------------------------------------------------------------------------------
class Recursive(nn.Module):
    """It calls itself again, from the forward of its child."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.child = nn.Identity()
        self.child.register_forward_hook(lambda m, a, out: self(out[0], out[1] - 1) if out[1] else out[0])

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        return torch.tanh(self.child((self.linear(x), depth)))


def keep_output(seen: list[Tensor]) -> Callable[..., None]:
    return lambda module, args, output: seen.append(output.detach().clone())


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Recursive()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize(("make", "at"), [(Around, "inner"), (Recursive, "")])
def test_a_module_inside_itself(make: type[nn.Module], at: str) -> None:
    torch.manual_seed(0)
    plain, x = make(), torch.randn(2, 4)
    torch.manual_seed(0)
    model, linear = make(), f"{at}.linear" if at else "linear"
    want: dict[str, list[Tensor]] = {at: [], linear: []}
    for name, seen in want.items():
        plain.get_submodule(name).register_forward_hook(keep_output(seen))
    plain(x).sum().backward()
    fm = FlexModel(model)
    with fm.capture(at, linear, grad=True) as acts:
        for _ in range(2):
            fm(x).sum().backward()
    for name, seen in want.items():
        got = acts.calls(name)
        assert len(got) == 2 * len(seen) == 6 and len(acts.grads(name)) == 6
        assert all(torch.equal(a, b) for a, b in zip(got, seen + seen, strict=True))
    assert fm._runtime.active is None


def test_a_recursion_that_fails_leaves_nothing_behind() -> None:
    fm = FlexModel(Recursive())
    with fm.capture("linear") as acts:
        with pytest.raises(RuntimeError):
            fm(torch.randn(2, 5))
        fm(torch.randn(2, 4), 1)
    assert len(acts.calls("linear")) == 2


def test_a_module_used_outside_of_the_model() -> None:
    """Each use by itself is a call; it ends there."""
    model = models.net()
    fm, x = FlexModel(model), torch.randn(2, 8)
    with fm.capture("layers.0.mlp", "head") as acts:
        fm(models.tokens())
        out = model.layers[0].mlp(x)
    assert len(acts.calls("layers.0.mlp")) == 2 and torch.equal(acts.calls("layers.0.mlp")[1], out)
    assert len(acts.calls("head")) == 1


# -- containers, and modules without tensors -----------------------------------------------------------------------
class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.list = nn.ModuleList([nn.Linear(4, 4)])
        self.dict = nn.ModuleDict({"x": nn.Linear(4, 4)})
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(4))])
        self.table = nn.ParameterDict({"x": nn.Parameter(torch.ones(4))})
        self.sequence = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.none, self.generator, self.number = Nothing(), Generator(), Number()

    def forward(self, x: Tensor) -> Tensor:
        x = self.sequence(self.dict["x"](self.list[0](x))) * self.weights[0] * self.table["x"]
        self.none(x=x)
        return sum(self.generator(x=x)) + self.number(x)["n"]


class Nothing(nn.Module):
    def forward(self, *, x: Tensor) -> None:
        return None


class Generator(nn.Module):
    def forward(self, *, x: Tensor) -> Iterator[Tensor]:
        yield x
        yield 2 * x


class Number(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"n": x.dim(), "s": "text"}


CONTAINERS = ("list", "dict", "weights", "table")


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_never_fires_and_is_refused(name: str) -> None:
    fm = FlexModel(Odd(), {})
    kind = type(fm.module.get_submodule(name)).__name__
    message = rf"{name} \(forward.*{kind} has no forward, so it never fires; hook what it holds \('{name}\.\*'\)"
    with pytest.raises(RegistrationError, match=message):
        fm.register_forward_hook(HookFunction(name))
    with pytest.raises(RegistrationError, match=message), fm.capture(name, hook_type="forward_pre"):
        pass
    with pytest.raises(RegistrationError, match=message), fm.edit(f"{name}*", lambda x: x):
        pass
    assert fm.hooks() == [] and not [r for r in fm.sites() if r.name == name]


def test_what_containers_hold() -> None:
    fm = FlexModel(Odd(), {}, deliver="all")
    fm.register_hook(HookFunction("weights.0"))
    fm.register_hook(HookFunction("table.x"))
    with fm.capture("**") as acts:
        fm(torch.randn(2, 4)).sum().backward()
    assert list(acts) == ["list.0", "dict.x", "sequence", "sequence.0", "sequence.1"]
    assert fm.output_ptr["weights.0"][0].shape == fm.get_module_parameter("table.x").shape == (4,)


@pytest.mark.parametrize(("name", "kind"), [("none", "NoneType"), ("generator", "generator"), ("number", "dict")])
def test_a_value_without_tensors_is_named(name: str, kind: str) -> None:
    fm = FlexModel(Odd(), {})
    with fm.capture(name) as acts:
        fm(torch.randn(2, 4))
    with pytest.raises(DeliveryError, match=rf"'{name}' fired, but there is no value.*its output is {kind}"):
        acts[name]
    edits: list[Callable[..., Any] | None] = [None, lambda x: x * 2]
    for edit in edits:
        handle = fm.register_forward_hook(HookFunction(name, editing_function=edit))
        with pytest.warns(UserWarning, match=rf"{name} \(forward\) has nothing to do: its output is {kind}"):
            fm(torch.randn(2, 4))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # once
            fm(torch.randn(2, 4))
        handle.remove()


@pytest.mark.parametrize("name", ["none", "generator"])
def test_inputs_by_keyword_alone(name: str) -> None:
    fm, x = FlexModel(Odd()), torch.randn(2, 4)
    with fm.capture(name, hook_type="forward_pre", unpack_idx="x") as acts, fm.capture("sequence") as others:
        whole = fm(x)
    assert torch.equal(acts[name], others["sequence"])
    with fm.edit(name, lambda t: t * 0, hook_type="forward_pre", unpack_idx="x"):
        assert torch.equal(fm(x), whole if name == "none" else torch.full_like(x, x.dim()))
