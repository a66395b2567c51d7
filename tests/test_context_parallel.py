"""Context parallelism: the sequence in parts over ``cp``, in zig-zag or contiguous; values in true order, gradients
the oracle's (equal tokens a rank, so that the mean of the ranks' losses is the loss)."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

import context
import parity
import pytest
import torch
import torch.distributed as dist
from oracle import relative_error
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.attention import SDPBackend, sdpa_kernel
from worlds import run_world

from flex_model import FlexModel, HookFunction, ZigZag
from flex_model.errors import LayoutError

ORDERS = {"zig-zag": ZigZag, "contiguous": Shard}
MESHES = [("cp",), ("dp", "cp"), ("cp", "tp")]


def _parity(names: tuple[str, ...], order: str) -> tuple[str, list[str], int]:
    plain = context.plain()
    placed = context.place(names, ORDERS[order], plain)
    inputs = context.full_inputs()
    mine = [placed.mine(x) for x in inputs]
    count = parity.compare(
        placed.model,
        plain,
        lambda m: m(*mine).pow(2).mean(),
        lambda m: m(*inputs).pow(2).mean(),
        mesh=placed.mesh,
    )
    return str(count), count.wrong + count.refused, count.tried


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("names", MESHES, ids=" x ".join)
def test_parity(names: tuple[str, ...], order: str) -> None:
    for text, problems, tried in run_world(2 ** len(names), _parity, names, order):
        print(f"{' x '.join(names)}, {order}: {text}")
        assert not problems and tried == 114


# -- edits -----------------------------------------------------------------------------------------------------
class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def _follows_order(module: nn.Module, x: Tensor, save_ctx: object, modules: Any) -> Tensor:
    """Each token gets what was before it, so that an order that is not the true one shows."""
    return modules["gain"](torch.tanh(x) + 0.1 * x.cumsum(1))


def _edited(names: tuple[str, ...], order: str, run: str, hook_type: str) -> list[str]:
    """What differs from the oracle: output, parameters' gradients, the trainable module's."""
    plain, site = context.plain(), "layers.0.mlp"
    gain = Gain()
    register = {"forward": "register_forward_hook", "forward_pre": "register_forward_pre_hook"}

    def by_hand(m: nn.Module, args: Any, out: Any = None) -> Any:
        value = args[0] if out is None else out
        return _follows_order(m, value, None, {"gain": gain})

    getattr(plain.get_submodule(site), register[hook_type])(by_hand)
    placed = context.place(names, ORDERS[order])
    inputs = context.full_inputs()
    mine = [placed.mine(x) for x in inputs]
    fm = FlexModel(placed.model, mesh=placed.mesh)
    fm.register_trainable_module("gain", Gain())
    parameters = dict(fm.module.named_parameters())
    names_of = {fm._runtime.names.strip(n): p for n, p in parameters.items()}
    problems = []
    with fm.edit(site, _follows_order, run=run, hook_type=hook_type), fm.capture("layers.1") as acts:
        out = fm(*mine)
        out.pow(2).mean().backward()
    seen: dict[str, Tensor] = {}
    plain.layers[1].register_forward_hook(lambda m, a, o: seen.__setitem__("layer", o.detach()))
    want = plain(*inputs)
    want.pow(2).mean().backward()
    if relative_error(acts["layers.1"], seen["layer"]) > 1e-5:
        problems.append("the next layer's value")
    if relative_error(fm.full_output(out), want) > 1e-5:
        problems.append("output")
    problems += parity.wrong_gradients(fm, plain, names_of)
    weight = fm.trainable_modules["gain"].weight.grad
    if relative_error(weight.full_tensor() if isinstance(weight, DTensor) else weight, gain.weight.grad) > 1e-5:
        problems.append("gain.weight")
    return problems


@pytest.mark.parametrize("run", ["every_rank", "one_rank", "sharded"])
@pytest.mark.parametrize("hook_type", ["forward", "forward_pre"])
def test_edits(run: str, hook_type: str) -> None:
    assert run_world(2, _edited, ("cp",), "zig-zag", run, hook_type) == [[]] * 2


@pytest.mark.parametrize("names", MESHES[1:], ids=" x ".join)
@pytest.mark.parametrize("run", ["every_rank", "one_rank", "sharded"])
def test_edits_on_two_axes(names: tuple[str, ...], run: str) -> None:
    assert run_world(4, _edited, names, "zig-zag", run, "forward") == [[]] * 4


# -- the order -------------------------------------------------------------------------------------------------
def _captured(kind: type[context.Causal], order: str, shift: int, layout: Any) -> tuple[str, list[int]]:
    placed = context.place(("cp",), ORDERS[order], context.plain(kind))
    ids, positions = (placed.mine(x) for x in context.full_inputs())
    output: dict[Any, Any] = {}
    fm = FlexModel(placed.model, output, mesh=placed.mesh, deliver="all")
    with torch.no_grad(), fm.capture("table") as acts:
        fm(ids, (positions + shift) % context.LENGTH)
    try:
        said = str(tuple(acts["table"].shape))
    except LayoutError as error:
        said = str(error)
    if layout is None:
        return said, []
    fm.register_forward_hook(HookFunction("table", layout={"cp": layout}))
    with torch.no_grad():
        fm(ids, (positions + shift) % context.LENGTH)
    fm.flush()
    table = placed.model.module.table.weight
    return said, [int((row - table).abs().sum(-1).argmin()) for row in output["table"][0][0]]


def test_an_unknown_order_is_refused_until_it_is_stated() -> None:
    for said, order in run_world(2, _captured, context.Unnamed, "zig-zag", 0, ZigZag(1)):
        assert "no positions are among the inputs" in said and "layout={'cp': ZigZag(1)}" in said
        assert order == list(range(context.LENGTH))


def test_positions_in_another_order_are_refused() -> None:
    for said, _ in run_world(2, _captured, context.Causal, "zig-zag", 1, None):
        assert "neither those of contiguous pieces nor of zig-zag ones" in said


def _reordered() -> list[bool]:
    """One model, called in one order and then in the other: each call goes by its own positions."""
    results = []
    placed = context.place(("cp",), ZigZag, wrapped=False)
    fm = FlexModel(placed.model, mesh=placed.mesh)
    inputs = context.full_inputs()
    seen: list[Tensor] = []
    plain = context.plain()
    plain.layers[0].register_forward_hook(lambda m, a, o: seen.append(o))
    plain(*inputs)
    for order in (ZigZag, Shard, ZigZag):
        placed.order = order
        with torch.no_grad(), fm.capture("layers.0") as acts:
            out = fm.full_output(fm(*(placed.mine(x) for x in inputs)))
        results.append(relative_error(acts["layers.0"], seen[0]) < 1e-5 and relative_error(out, plain(*inputs)) < 1e-5)
    return results


def test_each_call_goes_by_its_own_positions() -> None:
    assert run_world(2, _reordered) == [[True] * 3] * 2


class Upset(nn.Module):
    """Modules whose rows do not follow the tokens: turned round, in pairs, and a mean over what is here."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(32, 8)
        self.turned, self.paired, self.mean, self.table = (nn.Identity() for _ in range(4))

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = self.emb(ids)
        self.turned(x.flip(1))
        self.paired(x.unflatten(1, (-1, 2)).flatten(2))
        self.mean(x.mean(1))
        self.table(self.emb.weight * 2)
        return x


def _upset() -> dict[str, str]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    torch.manual_seed(0)
    placed = context.Placed(Upset(), mesh, ZigZag)
    fm = FlexModel(placed.model, mesh=mesh)
    with torch.no_grad(), fm.capture("*") as acts:
        fm(*(placed.mine(x) for x in context.full_inputs()))
    said = {}
    for name in ("emb", "turned", "paired", "mean", "table"):
        try:
            said[name] = str(tuple(acts[name].shape))
        except LayoutError as error:
            said[name] = str(error)
    return said


def test_rows_that_do_not_follow_the_tokens_are_refused() -> None:
    for said in run_world(2, _upset):
        assert said["emb"] == "(4, 8, 8)" and said["table"] == "(32, 8)"
        assert "do not follow the order of the sequence" in said["turned"]
        assert "2 rows for 4 tokens" in said["paired"]
        assert "should be the same along 'cp'" in said["mean"] or "depends on the sequence" in said["mean"]


def _whole() -> bool:
    """A shard as a DTensor, which cannot say zig-zag and is in contiguous order; the batch, put together."""
    placed = context.place(("cp",), ZigZag)
    inputs = context.full_inputs()
    mine = tuple(placed.mine(x) for x in inputs)
    fm = FlexModel(placed.model, mesh=placed.mesh)
    with torch.no_grad(), fm.capture("layers.0", deliver="local") as here, fm.capture("layers.0") as acts:
        fm(*mine)
    batch = fm.full_batch({"ids": mine[0], "positions": mine[1]})
    value = here["layers.0"]
    assert isinstance(value, DTensor)
    same = torch.equal(value.full_tensor(), acts["layers.0"])
    return same and torch.equal(batch["ids"], inputs[0]) and torch.equal(batch["positions"], inputs[1])


def test_shards_and_batches() -> None:
    assert run_world(2, _whole) == [True] * 2


# -- torch's own context ---------------------------------------------------------------------------------------
def torch_context(device: str, causal: bool, balanced: bool, backend: SDPBackend) -> tuple[str, list[str], int]:
    """The context opens after the model was wrapped, parts the inputs and closes again."""
    plain = context.with_sdpa(causal=causal).to(device)
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("cp",))
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    inputs = [x.to(device) for x in context.full_inputs()]
    with ExitStack() as stack:

        def run(m: nn.Module) -> Tensor:
            mine = [x.clone() for x in inputs]
            options = torch.distributed.tensor.experimental._attention._cp_options
            options.enable_load_balance = balanced
            stack.enter_context(context_parallel(mesh, buffers=mine, buffer_seq_dims=[1, 1]))
            stack.enter_context(sdpa_kernel(backend))
            out: Tensor = m(*mine)
            return out.pow(2).mean()

        count = parity.compare(model, plain, run, lambda m: m(*inputs).pow(2).mean())
    return str(count), count.wrong + count.refused, count.tried


@pytest.mark.parametrize("balanced", [True, False], ids=["zig-zag", "contiguous"])
def test_torch_context(balanced: bool) -> None:
    """On the CPU torch runs it with the math kernel and without a mask."""
    for text, problems, tried in run_world(2, torch_context, "cpu", False, balanced, SDPBackend.MATH):
        print(f"torch's context_parallel, {'zig-zag' if balanced else 'contiguous'}: {text}")
        assert not problems and tried == 114


# What torch cannot run on the CPU, and what it says.
CANNOT = {
    (True, SDPBackend.MATH): "got mixed torch.Tensor and DTensor",
    (True, SDPBackend.FLASH_ATTENTION): "does not have a sharding strategy registered",
    (True, SDPBackend.EFFICIENT_ATTENTION): "No viable backend",
}


def _bare(causal: bool, backend: SDPBackend) -> str:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    with context_parallel(mesh, buffers=[q, k, v], buffer_seq_dims=[2] * 3), sdpa_kernel(backend):
        try:
            nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        except Exception as error:
            return str(error)
    return "ran"


@pytest.mark.parametrize(("causal", "backend"), CANNOT, ids=lambda x: getattr(x, "name", "causal"))
def test_what_torch_cannot_run_here(causal: bool, backend: SDPBackend) -> None:
    print(f"context_parallel on the CPU, causal, {backend.name}: not run, {CANNOT[causal, backend]!r}")
    assert CANNOT[causal, backend] in run_world(2, _bare, causal, backend)[0]
