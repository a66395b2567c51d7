"""What flex-model 0.1.0 got wrong, numbered as in the list of its defects: each must hold here."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from conftest import REGISTER, installed, keep, torch_hook
from models import Block, inputs, make, net, tokens
from oracle import relative_error
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP
from transformers.modeling_outputs import CausalLMOutputWithPast
from worlds import run_world

from flex_model import DummyModule, FlexModel, HookFunction, Site
from flex_model.errors import EditError, FlexModelError, GroupError, LayoutError, ShapeError
from flex_model.trees import tensors

UP, MLP = "layers.0.mlp.up", "layers.0.mlp"
ENGINES = pytest.mark.parametrize("engine", ["ddp", "fsdp1", "fsdp2", "tp"])


def parallel(engine: str, model: nn.Module | None = None) -> nn.Module:
    model = net() if model is None else model
    if engine == "ddp":
        return DDP(model)
    if engine == "fsdp1":
        policy = ModuleWrapPolicy({Block})
        return FSDP(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if engine == "tp":
        for layer in model.layers:
            parallelize_module(layer.mlp, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        return model
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def mine(engine: str, batch: Tensor) -> Tensor:
    """What this rank of the engine gets of a batch."""
    return batch if engine == "tp" else batch.chunk(dist.get_world_size())[dist.get_rank()]


def loss(out: Tensor) -> Tensor:
    return out.pow(2).mean()


def full_gradients(engine: str, wrapped: nn.Module) -> dict[str, Tensor]:
    """Whole gradients by clean name, without this library."""
    if engine == "fsdp1":
        with FSDP.summon_full_params(wrapped, with_grads=True):
            found = {n: p.grad.clone() for n, p in wrapped.named_parameters()}
    else:
        found = {n: p.grad for n, p in wrapped.named_parameters()}
    whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}
    return {n.replace("_fsdp_wrapped_module.", "").removeprefix("module."): g for n, g in whole.items()}


def probe() -> nn.Module:
    torch.manual_seed(5)
    return nn.Linear(16, 16)


# -- 1 -------------------------------------------------------------------------------------------------------
def _reading_changes_no_gradient(engine: str) -> None:
    bare, wrapped, plain = parallel(engine), parallel(engine), net()
    fm = FlexModel(wrapped, {}, deliver="all")
    seen: dict[str, list[Tensor]] = {kind: [] for kind in REGISTER if kind != "tensor"}
    for kind, values in seen.items():
        torch_hook(plain, UP, kind, keep(values))
        getattr(fm, REGISTER[kind])(HookFunction(UP))
    loss(plain(tokens())).backward()
    expected = bare(mine(engine, tokens()))
    loss(expected).backward()
    out = fm(mine(engine, tokens()))
    loss(out).backward()
    assert torch.equal(out, expected)
    bits, read = full_gradients(engine, bare), full_gradients(engine, wrapped)
    for name, parameter in plain.named_parameters():
        assert torch.equal(read[name], bits[name]), name
        assert relative_error(read[name], parameter.grad) < 1e-5, name
    for kind, values in seen.items():
        key = UP if kind == "forward" else Site(UP, kind, 0)
        assert relative_error(fm.output_ptr[key][0], values[0]) < 1e-5, kind


@ENGINES
def test_1_a_hook_that_only_reads_changes_no_gradient(engine):
    run_world(2, _reading_changes_no_gradient, engine)


def _gradients_through_an_edit(engine: str) -> None:
    for run in ("every_rank", "one_rank"):
        _gradients_of_a_run(engine, run)


def _gradients_of_a_run(engine: str, run: str) -> None:
    plain, own = net(), probe()
    torch_hook(plain, UP, "forward", lambda x: own(x - x.mean(0)) * x.softmax(-1))
    loss(plain(tokens())).backward()
    wrapped = parallel(engine)
    fm = FlexModel(wrapped)
    fm.register_trainable_module("probe", probe())

    def edit(module, x, save_ctx, modules):
        return modules["probe"](x - x.mean(0)) * x.softmax(-1)

    fm.register_forward_hook(HookFunction(UP, editing_function=edit, run=run))
    loss(fm(mine(engine, tokens()))).backward()
    for name, grad in full_gradients(engine, wrapped).items():
        assert relative_error(grad, plain.get_parameter(name).grad) < 1e-5, name
    for a, b in zip(fm.trainable_modules["probe"].parameters(), own.parameters(), strict=True):
        grad = a.grad.full_tensor() if isinstance(a.grad, DTensor) else a.grad
        assert relative_error(grad, b.grad) < 1e-5


@ENGINES
def test_1_gradients_of_edits_and_trainable_modules_are_the_oracles(engine):
    run_world(2, _gradients_through_an_edit, engine)


# -- 2 -------------------------------------------------------------------------------------------------------
def test_2_a_disabled_group_is_enabled_again():
    fm = FlexModel(net(), {})
    fm.create_hook_group("mlps", MLP)
    fm(tokens(), groups="mlps", complement=True)
    assert fm.output_ptr == {}
    fm(tokens(), groups="mlps")
    assert len(fm.output_ptr[MLP]) == 1


def test_2_restore_with_disabled_hooks():
    model = net()
    fm = FlexModel(model)
    fm.create_hook_group("mlps", "mlp")
    with fm.groups("mlps", complement=True):
        assert fm.restore() is model
    assert installed(model) == 0


def test_2_an_unknown_group_disables_nothing():
    fm = FlexModel(net(), {})
    fm.register_forward_hook(HookFunction(MLP))
    with pytest.raises(GroupError, match="mpls"):
        fm(tokens(), groups="mpls")
    fm(tokens())
    assert len(fm.output_ptr[MLP]) == 1


# -- 3 -------------------------------------------------------------------------------------------------------
def _part_of_the_world() -> None:
    group, rank = dist.new_group([1, 2]), dist.get_rank()
    if rank == 0:
        return
    plain, seen = net(), []
    torch_hook(plain, MLP, "forward", keep(seen))
    plain(tokens())
    fm = FlexModel(DDP(net(), process_group=group), {}, data_parallel_size=2, process_group=group)
    fm.register_forward_hook(HookFunction(MLP))
    with fm.capture(MLP) as acts, fm.edit("norm", lambda x: x * 1, run="one_rank"):
        fm(tokens().chunk(2)[rank - 1])
    assert relative_error(acts[MLP], seen[0]) < 1e-6
    assert len(fm.output_ptr.get(MLP, [])) == (rank == 1)
    assert rank != 1 or relative_error(fm.output_ptr[MLP][0], seen[0]) < 1e-6


def test_3_ranks_of_a_group_are_not_those_of_the_world():
    run_world(3, _part_of_the_world)


def _evaluation_of_unequal_length() -> None:
    rank, fm = dist.get_rank(), FlexModel(DDP(net()).eval())
    plain, seen = net(), []
    torch_hook(plain, MLP, "forward", keep(seen))
    batches = [tokens(4), tokens(4, 5), tokens(2, 3)]
    with torch.no_grad(), fm.capture(MLP) as acts:
        for i, batch in enumerate(batches[: 3 if rank == 0 else 2]):
            part = batch if i == 2 else batch.chunk(2)[rank]
            fm.module(part)
            plain(batch)
        fm.flush()
        values = acts.calls(MLP)
    if rank == 0:
        assert all(relative_error(a, b) < 1e-6 for a, b in zip(values, seen, strict=True))
    assert [v.shape[:2] for v in values] == [(4, 6), (4, 5), (2, 3)]


def test_3_every_rank_flushes():
    run_world(2, _evaluation_of_unequal_length)


# -- 4 -------------------------------------------------------------------------------------------------------
def _what_the_wrapper_offers(engine: str) -> None:
    fm, plain = FlexModel(parallel(engine), {}, deliver="all"), net()
    for name, parameter in plain.named_parameters():
        assert torch.equal(fm.get_module_parameter(name, tuple(parameter.shape)), parameter), name
    fm.register_trainable_module("probe", probe())
    assert fm.all_modules_names == [*(n for n, _ in plain.named_modules()), "probe"]
    assert {id(p) for p in fm.trainable_modules["probe"].parameters()} <= {id(p) for p in fm.parameters()}
    assert [n for n, _ in fm.named_parameters()][-2:] == [
        "trainable_modules.probe.weight",
        "trainable_modules.probe.bias",
    ]
    fm.create_hook_group("mlps", "mlp")
    fm(mine(engine, tokens()), groups="mlps")
    assert set(fm.output_ptr) == {n for n, _ in plain.named_modules() if "mlp" in n}


@ENGINES
def test_4_hook_groups_parameters_names_and_trainable_modules(engine):
    run_world(2, _what_the_wrapper_offers, engine)


# -- 5 -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", REGISTER)
def test_5_a_failed_registration_leaves_the_hook_usable(kind):
    name = "head.weight" if kind == "tensor" else "head"
    fm, hook = FlexModel(net(), {}), HookFunction("haed")
    register = getattr(fm, REGISTER[kind])
    for _ in range(2):
        with pytest.raises(FlexModelError, match=r"'haed'.*'head"):
            register(hook)
    hook.module_name = name
    register(hook)
    loss(fm(tokens())).backward()
    assert len(fm.output_ptr[name]) == 1


# -- 6 -------------------------------------------------------------------------------------------------------
class Named(NamedTuple):
    hidden: Tensor
    twice: Tensor


@dataclass
class Data:
    hidden: Tensor
    twice: Tensor
    note: str = "kept"


Old = namedtuple("Old", "hidden twice")

CONTAINERS: dict[str, Any] = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "dict": lambda x, y: {"hidden": x, "twice": y},
    "ordered dict": lambda x, y: OrderedDict(hidden=x, twice=y),
    "named tuple": Old,
    "NamedTuple": Named,
    "dataclass": Data,
    "nested": lambda x, y: ({"hidden": (x,)}, None, [Data(x, y)]),
    "model output": lambda x, y: CausalLMOutputWithPast(logits=x, hidden_states=(y,)),
}


class Held(nn.Module):
    """Returns its value in some container, and takes some by keyword only."""

    def __init__(self, container: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.place, self.container = nn.Linear(4, 4), DummyModule(), container

    def forward(self, *, x: Tensor) -> Any:
        x = self.linear(x)
        return self.place(CONTAINERS[self.container](x, x * 2))


def rows() -> Tensor:
    return torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(2))


def _contents_of(container: str, engine: str) -> None:
    model = Held(container)
    x = rows() if engine == "one process" else mine(engine, rows())
    expected = Held(container).linear(rows())
    fm = FlexModel(model if engine == "one process" else DDP(model))
    with (
        fm.capture("place", unpack_idx=0) as first,
        fm.capture("place", unpack_idx=-1) as last,
        fm.capture("linear", hook_type="forward_pre") as given,
        fm.capture("place", hook_type="forward_pre") as before,
    ):
        out = fm(x=x)
    assert relative_error(first["place"], expected) < 1e-6 and relative_error(before["place"], expected) < 1e-6
    assert relative_error(last["place"], expected * 2) < 1e-6
    assert torch.equal(given["linear"], rows())
    assert type(out) is type(Held(container)(x=x))
    with fm.edit("place", lambda t: t * 10, unpack_idx="all"):
        edited = fm(x=x)
    with fm.edit("place", lambda t: None, unpack_idx="all"):
        same = fm(x=x)
    for a, b, c in zip(tensors(out), tensors(edited), tensors(same), strict=True):
        assert torch.equal(b, a * 10) and torch.equal(c, a)
    assert type(edited) is type(out)
    assert not isinstance(edited, Data) or edited.note == "kept"


@pytest.mark.parametrize("container", CONTAINERS)
def test_6_tensors_are_found_in_any_value(container):
    _contents_of(container, "one process")


@pytest.mark.parametrize("container", ["NamedTuple", "dataclass", "nested", "model output"])
def test_6_tensors_are_found_in_any_value_under_ddp(container):
    run_world(2, _contents_of, container, "ddp")


def _keyword_inputs_of_the_model(engine: str) -> None:
    fm = FlexModel(Held("dict") if engine == "one process" else DDP(Held("dict")), {}, deliver="all")
    fm.register_forward_pre_hook(HookFunction("", unpack_idx="x"))
    x, changed = rows() if engine == "one process" else mine(engine, rows()), Held("dict")
    with fm.edit("", lambda t: t + 1, hook_type="forward_pre"):
        out = fm(x=x)
    assert torch.equal(fm.output_ptr[""][0], rows())
    assert relative_error(out["hidden"], changed(x=x + 1)["hidden"]) < 1e-6


def test_6_keyword_inputs_of_the_model_itself():
    _keyword_inputs_of_the_model("one process")


def test_6_keyword_inputs_of_the_model_itself_under_ddp():
    run_world(2, _keyword_inputs_of_the_model, "ddp")


class Returns(nn.Module):
    """``place`` meets a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.place = nn.Parameter(torch.arange(4.0)), DummyModule()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.place(self.bias)


def _parameters_and_dtensors() -> None:
    fm, plain = FlexModel(DDP(Returns())), Returns()
    with fm.capture("place") as acts, fm.capture("place", hook_type="full_backward_pre") as grads:
        loss(fm(mine("ddp", rows()))).backward()
    loss(plain(rows())).backward()
    assert torch.equal(acts["place"], torch.arange(4.0)) and type(acts["place"]) is Tensor
    assert relative_error(grads["place"], plain.bias.grad) < 1e-6

    mesh = init_device_mesh("cpu", (2,))
    plain, seen = net(), []
    torch_hook(plain, UP, "forward", lambda x: (keep(seen)(x), x * 2)[1])
    expected, model = plain(tokens()), net()
    for layer in model.layers:
        plan = {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()}
        parallelize_module(layer.mlp, mesh, plan)
    fm = FlexModel(model)
    with fm.capture(UP) as acts, fm.edit(UP, lambda x: x * 2):
        out = fm(tokens())
    assert relative_error(acts[UP], seen[0]) < 1e-6 and relative_error(out, expected) < 1e-6


def test_6_parameters_and_dtensors_are_captured():
    fm = FlexModel(Returns())
    with fm.capture("place") as acts:
        fm(rows())
    assert torch.equal(acts["place"], torch.arange(4.0)) and type(acts["place"]) is Tensor
    run_world(2, _parameters_and_dtensors)


# -- 7 -------------------------------------------------------------------------------------------------------
class Overwrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.first(x * 1)).mul_(9)


def _copies(engine: str) -> None:
    model = (
        Overwrites()
        if engine == "one process"
        else DDP(nn.Sequential(OrderedDict(lin=nn.Linear(4, 4), rest=Overwrites())))
    )
    prefix, x = ("", rows()) if engine == "one process" else ("rest.", mine(engine, rows()))
    expected = rows() if engine == "one process" else model.module.lin(rows()).detach()
    fm = FlexModel(model, {}, deliver="all")
    fm.register_forward_hook(HookFunction(prefix + "first"))
    fm.register_forward_pre_hook(HookFunction(prefix + "relu"))
    fm.register_forward_hook(HookFunction(prefix + "relu"))
    for _ in range(2):
        fm(x).detach().zero_()
    for i in range(2):
        assert torch.equal(fm.output_ptr[prefix + "first"][i], expected)
        assert torch.equal(fm.output_ptr[prefix + "relu"][i], expected)
        assert torch.equal(fm.output_ptr[Site(prefix + "relu", "forward", 0)][i], expected.relu())


def test_7_captured_values_are_copies_and_hook_types_share_no_key():
    _copies("one process")


def test_7_captured_values_are_copies_under_ddp():
    run_world(2, _copies, "ddp")


# -- 8 -------------------------------------------------------------------------------------------------------
def _shapes_are_found(engine: str) -> None:
    rank, plain, seen = dist.get_rank(), net(), []
    torch_hook(plain, UP, "forward", keep(seen))
    plain(tokens())
    fm, x = FlexModel(parallel(engine), {}), mine(engine, tokens())
    for shape in (None, (None, None, 16), (4, None, None), (4, 6, 16)):
        handle = fm.register_forward_hook(HookFunction(UP, shape))
        fm(x)
        handle.remove()
    if rank == 0:
        assert len(fm.output_ptr[UP]) == 4
        assert all(relative_error(v, seen[0]) < 1e-6 for v in fm.output_ptr[UP])
    for shape in ((None, None, 8), (None, 16, None), (8, None, None), (None, None, 32), (None, None)):
        handle = fm.register_forward_hook(HookFunction(UP, shape))
        with pytest.raises((ShapeError, LayoutError), match=r"layers\.0\.mlp\.up"):
            fm(x)
        handle.remove()
    assert len(fm.output_ptr.get(UP, [])) == (4 if rank == 0 else 0)


@ENGINES
def test_8_expected_shape_is_not_needed_and_is_checked(engine):
    run_world(2, _shapes_are_found, engine)


def _decode_before_prefill(engine: str) -> None:
    plain, seen = net(), []
    torch_hook(plain, UP, "forward", lambda x: (keep(seen)(x), x * 2 - x.mean(-1, keepdim=True))[1])
    fm = FlexModel(parallel(engine))
    with fm.capture(UP) as acts, fm.edit(UP, lambda x: x * 2 - x.mean(-1, keepdim=True)):
        for batch, length in ((4, 1), (4, 6), (2, 3), (4, 1)):
            ids = tokens(batch, length)
            assert relative_error(fm(mine(engine, ids)), mine(engine, plain(ids))) < 1e-5
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(acts.calls(UP), seen, strict=True))


@ENGINES
def test_8_shapes_may_change_from_call_to_call(engine):
    run_world(2, _decode_before_prefill, engine)


# -- 9 -------------------------------------------------------------------------------------------------------
class Positions(nn.Module):
    """Adds a table that has no batch dim; ``rows`` of it, as many as a rank has samples."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.table, self.place, self.linear = nn.Embedding(rows, 8), DummyModule(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        positions = self.place(self.table.weight * 2)  # (rows, 8)
        return self.linear(x) + positions.sum(0)


def _replicated_without_a_batch(rows: int) -> None:
    torch.manual_seed(0)
    model, x = Positions(rows), torch.randn(4, 8)
    plain = copy.deepcopy(model)
    loss(plain(x)).backward()
    fm = FlexModel(DDP(model), {}, deliver="all")
    fm.register_forward_hook(HookFunction("place"))
    with fm.capture("place", grad=True) as acts, fm.edit("place", lambda t: t * 1):
        loss(fm(mine("ddp", x))).backward()
    for value in (acts["place"], fm.output_ptr["place"][0]):
        assert torch.equal(value, plain.table.weight * 2)
    assert relative_error(acts.grad("place"), plain.table.weight.grad / 2) < 1e-5
    assert relative_error(model.table.weight.grad, plain.table.weight.grad) < 1e-5


@pytest.mark.parametrize("rows", [2, 4, 5])
def test_9_a_replicated_value_without_a_batch_dim_stays_as_long_as_it_is(rows):
    run_world(2, _replicated_without_a_batch, rows)


def _uneven_batches(run: str) -> None:
    rank, sizes = dist.get_rank(), (3, 1)

    def edit(x: Tensor) -> Tensor:
        return x - 0.5 * x.mean(0)

    plain, seen, grads = net(), [], []
    torch_hook(plain, MLP, "forward", lambda x: (keep(seen)(x), edit(x))[1])
    torch_hook(plain, MLP, "full_backward", keep(grads))
    expected = plain(tokens())
    sum(loss(part) / 2 for part in expected.split(sizes)).backward()
    ddp = DDP(net())
    fm = FlexModel(ddp, {}, deliver="all")
    fm.register_forward_hook(HookFunction(MLP, editing_function=edit, run=run))
    fm.register_full_backward_hook(HookFunction(MLP))
    out = fm(tokens().split(sizes)[rank])
    loss(out).backward()
    assert relative_error(out, expected.split(sizes)[rank]) < 1e-5
    assert relative_error(fm.output_ptr[MLP][0], seen[0]) < 1e-6
    assert relative_error(fm.output_ptr[Site(MLP, "full_backward", 0)][0], grads[0]) < 1e-5
    for name, grad in full_gradients("ddp", ddp).items():
        assert relative_error(grad, plain.get_parameter(name).grad) < 1e-5, name


@pytest.mark.parametrize("run", ["every_rank", "one_rank"])
def test_9_uneven_batches(run):
    run_world(2, _uneven_batches, run)


# -- 10 ------------------------------------------------------------------------------------------------------
def _random_edits(engine: str) -> None:
    for name in (UP, "norm"):
        _random_edits_at(engine, name)


def _random_edits_at(engine: str, name: str) -> None:
    def noise(x: Tensor) -> Tensor:
        return x + torch.randn_like(x)

    torch.manual_seed(100 + dist.get_rank())
    alone, fm = FlexModel(net()), FlexModel(parallel(engine))
    state = torch.get_rng_state()
    for model in (alone, fm):
        model.register_forward_hook(HookFunction(name, editing_function=noise, random=True, capture=False))
    for _ in range(2):
        expected, out = alone(tokens()), fm(mine(engine, tokens()))
        assert relative_error(out, mine(engine, expected)) < 1e-5
    assert torch.equal(torch.get_rng_state(), state)


@ENGINES
def test_10_random_edits_are_those_of_one_process(engine):
    run_world(2, _random_edits, engine)


def _one_rank_fails(engine: str, kinds: tuple[str, ...], run: str) -> None:
    for kind in kinds:
        _one_rank_fails_once(engine, kind, run)


def _one_rank_fails_once(engine: str, kind: str, run: str) -> None:
    failing = [True]

    def edit(x: Tensor) -> Tensor:
        if failing and dist.get_rank() == (0 if run == "one_rank" else 1):
            raise ZeroDivisionError("no")
        return x * 2

    plain = net()
    torch_hook(plain, UP, kind, lambda x: x * 2)
    wrapped = parallel(engine)
    fm = FlexModel(wrapped, {})
    getattr(fm, REGISTER[kind])(HookFunction(UP, editing_function=edit, run=run))
    x = mine(engine, tokens())
    with pytest.raises(EditError, match=r"layers\.0\.mlp\.up.*rank [01].*ZeroDivisionError: no"):
        loss(fm(x)).backward()
    assert not any(fm.output_ptr.values())
    failing.clear()
    fm.zero_grad()
    out = fm(x)
    loss(out).backward()
    expected = plain(tokens())
    loss(expected).backward()
    assert relative_error(out, mine(engine, expected)) < 1e-5
    for name, grad in full_gradients(engine, wrapped).items():
        assert relative_error(grad, plain.get_parameter(name).grad) < 1e-5, name


@ENGINES
@pytest.mark.parametrize("kinds", [("forward", "forward_pre"), ("full_backward", "full_backward_pre")])
def test_10_an_edit_that_raises_on_one_rank_raises_on_all(engine, kinds):
    run_world(2, _one_rank_fails, engine, kinds, "every_rank")


@pytest.mark.parametrize("engine", ["ddp", "tp"])
def test_10_an_edit_that_raises_on_the_one_rank_raises_on_all(engine):
    run_world(2, _one_rank_fails, engine, ("forward",), "one_rank")


# -- 11 ------------------------------------------------------------------------------------------------------
SETTINGS = {"max_new_tokens": 3, "do_sample": False, "use_cache": True, "pad_token_id": 0}


def test_11_generate_is_hooked_once_a_decoding_step():
    batch, phases, seen = inputs("llama", 2, 5), [], []
    plain = make("llama")
    torch_hook(plain, "model.norm", "forward", lambda x: (keep(seen)(x), x * 1.5)[1])
    expected = plain.generate(**batch, **SETTINGS)

    def edit(x, call):
        phases.append((call.index, call.phase))
        return x * 1.5

    fm = FlexModel(make("llama"))
    with fm.capture("model.norm") as acts, fm.edit("model.norm", edit):
        assert torch.equal(fm.generate(**batch, **SETTINGS), expected)
    assert all(torch.equal(a, b) for a, b in zip(acts.calls("model.norm"), seen, strict=True))
    assert phases == [(0, "prefill"), (1, "decode"), (2, "decode")]


def _generate_under_ddp() -> None:
    rank, batch = dist.get_rank(), inputs("llama", 4, 5)
    plain, seen = make("llama"), []
    torch_hook(plain, "lm_head", "forward", keep(seen))
    expected = plain.generate(**batch, **SETTINGS)
    fm = FlexModel(DDP(make("llama")))
    with fm.capture("lm_head") as acts:
        out = fm.generate(**{k: v.chunk(2)[rank] for k, v in batch.items()}, **SETTINGS)
    assert torch.equal(out, expected.chunk(2)[rank])
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(acts.calls("lm_head"), seen, strict=True))


def test_11_generate_under_ddp():
    run_world(2, _generate_under_ddp)


def _clean_names(engine: str) -> None:
    fm = FlexModel(parallel(engine), {})
    assert fm.wrapped_module_names == [n for n, _ in net().named_modules()]
    assert [n for n, _ in fm.named_parameters()] == [n for n, _ in net().named_parameters()]
    fm.register_forward_hook(HookFunction(UP))
    assert [row.name for row in fm.hooks()] == [UP]
    with fm.capture("layers.*.mlp") as acts:
        fm(mine(engine, tokens()))
    assert list(acts) == ["layers.0.mlp", "layers.1.mlp"]


@ENGINES
def test_11_prefixes_of_wrappers_stay_out_of_names(engine):
    run_world(2, _clean_names, engine)


def test_11_constructing_leaves_logging_alone():
    root, own = logging.getLogger(), logging.getLogger("flex_model")
    before = root.level, list(root.handlers), own.level, list(own.handlers)
    fm = FlexModel(net(), {})
    fm.register_forward_hook(HookFunction(MLP))
    fm(tokens())
    assert (root.level, root.handlers, own.level, own.handlers) == before


def test_11_the_public_names_are_at_the_top():
    import flex_model

    assert {"FlexModel", "HookFunction", "DummyModule", "edits"} <= set(flex_model.__all__)
    assert all(hasattr(flex_model, n) for n in flex_model.__all__)
