"""Values that are no plain even batch: uneven, ragged, without a batch dim, decoded, partial sums, strided shards."""

from __future__ import annotations

import copy
from typing import Any

import engines
import models
import torch
import torch.distributed as dist
from oracle import relative_error
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from worlds import run_world

from flex_model import DummyModule, FlexModel, HookFunction
from flex_model.errors import LayoutError
from flex_model.routing.assembly import Parts


def _uneven_batches(engine: str) -> list[Any]:
    """Ranks hold 3 and 2 samples: captures, an edit over the batch, and the gradients through it."""

    def edit(x: Tensor) -> Tensor:
        return torch.tanh(x - x.mean(0, keepdim=True))

    full = models.tokens(batch=5)
    mine = full[:3] if dist.get_rank() == 0 else full[3:]
    plain = models.net()
    seen: dict[str, Tensor] = {}
    plain.layers[1].register_forward_hook(lambda m, a, o: seen.__setitem__("layer", o.detach()))
    plain.layers[0].register_forward_hook(lambda m, a, o: edit(o))
    output = plain(full)
    (0.5 * output[:3].pow(2).mean() + 0.5 * output[3:].pow(2).mean()).backward()
    fm = FlexModel(engines.place(engine, models.net()).model)
    parameters = dict(fm.named_parameters())
    with fm.edit("layers.0", edit), fm.capture("layers.1") as acts:
        fm(mine).pow(2).mean().backward()
    import parity

    return [
        relative_error(acts["layers.1"], seen["layer"]) < 1e-5,
        parity.wrong_gradients(fm, plain, parameters),
    ]


def test_uneven_batches_ddp() -> None:
    assert run_world(2, _uneven_batches, "ddp") == [[True, []]] * 2


def test_uneven_batches_fsdp2() -> None:
    assert run_world(2, _uneven_batches, "fsdp2") == [[True, []]] * 2


def _ragged() -> list[Any]:
    """Different lengths make no rectangle: the parts in rank order, and an edit of this rank's own part."""
    mine = models.tokens(2, 4 + dist.get_rank())
    fm = FlexModel(engines.place("ddp", models.net()).model)
    shapes = []

    def edit(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return x * 2

    with fm.edit("layers.1", edit), fm.capture("layers.0") as acts:
        fm(mine)
    value = acts["layers.0"]
    assert isinstance(value, Parts)
    return [[tuple(t.shape) for t in value.tensors], list(value.coordinates), shapes]


def test_ragged_batches() -> None:
    for rank, (parts, coordinates, edited) in enumerate(run_world(2, _ragged)):
        assert parts == [(2, 4, 8), (2, 5, 8)]
        assert coordinates == [{"dp": 0}, {"dp": 1}]
        assert edited == [(2, 4 + rank, 8)]


class WithTable(nn.Module):
    """Returns a table that has no batch dim, and a mean over the batch that no rank alone knows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 8)
        self.center = nn.Identity()
        self.mix = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        table = self.table(torch.arange(x.shape[1]))
        self.center(x.mean(0))
        return self.mix(x + table)


def _no_batch_dim(edit: bool) -> list[Any]:
    torch.manual_seed(0)
    plain = WithTable()
    full = torch.randn(4, 6, 8)
    fm = FlexModel(nn.parallel.DistributedDataParallel(copy.deepcopy(plain)))
    mine = full.chunk(2)[dist.get_rank()]
    with fm.capture("table", "mix", "center", grad=True) as acts:
        loss = fm(mine).pow(2).mean()
        loss.backward()
    table = plain.table(torch.arange(6)).detach().requires_grad_()
    plain.mix(full + table).pow(2).mean().backward()
    try:
        refused = str(acts["center"])
    except LayoutError as error:
        refused = str(error)
    return [
        relative_error(acts["table"], table) < 1e-6,
        relative_error(acts.grad("table"), table.grad) < 1e-5,
        acts["mix"].shape == (4, 6, 8),
        "center" in refused and "layout=" in refused,
    ]


def test_no_batch_dim_and_refusal() -> None:
    assert run_world(2, _no_batch_dim, False) == [[True] * 4] * 2


def _override() -> list[Any]:
    """What was refused is delivered when the user says how it lies."""
    torch.manual_seed(0)
    plain = WithTable()
    full = torch.randn(4, 6, 8)
    output: dict[str, list[Tensor]] = {}
    fm = FlexModel(nn.parallel.DistributedDataParallel(copy.deepcopy(plain)), output, deliver="all")
    fm.register_forward_hook(HookFunction("center", layout={"dp": Partial("avg")}))
    fm(full.chunk(2)[dist.get_rank()])
    return [relative_error(output["center"][0], full.mean(0)) < 1e-6]


def test_layout_override() -> None:
    assert run_world(2, _override) == [[True]] * 2


class PartialSum(nn.Module):
    """A rowwise layer whose partial outputs are summed later, by somebody else."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16, bias=False)
        self.down = nn.Linear(16, 8, bias=False)
        self.sum = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.sum(self.down(torch.relu(self.up(x))))


def _partial(grad: bool) -> list[Any]:
    torch.manual_seed(0)
    plain, x = PartialSum(), torch.randn(3, 5, 8)
    model = copy.deepcopy(plain)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    plan = {
        "up": ColwiseParallel(),
        "down": RowwiseParallel(output_layouts=Partial(), use_local_output=False),
    }
    parallelize_module(model, mesh, plan)
    seen: dict[str, Tensor] = {}
    plain.down.register_forward_hook(lambda m, a, o: seen.__setitem__("down", o.detach()) or torch.tanh(o))
    want = plain(x)
    fm = FlexModel(model)
    with torch.set_grad_enabled(grad), fm.capture("down") as acts, fm.edit("down", torch.tanh):
        got = fm(x)
    result = [
        relative_error(acts["down"], seen["down"]) < 1e-5,
        relative_error(got.full_tensor(), want) < 1e-5,
    ]
    if grad:
        want.pow(2).sum().backward()
        got.full_tensor().pow(2).sum().backward()
        result.append(relative_error(fm.up.weight.grad.full_tensor(), plain.up.weight.grad) < 1e-5)
    return result


def test_partial_values() -> None:
    assert run_world(2, _partial, True) == [[True] * 3] * 2
    assert run_world(2, _partial, False) == [[True] * 2] * 2


class Fused(nn.Module):
    """gate and up in one projection, the way packed layers hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Linear(8, 24, bias=False)
        self.after = DummyModule()
        self.down = nn.Linear(12, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.after(self.gate_up(x)).chunk(2, -1)
        return self.down(torch.sigmoid(gate) * up)


class LocalFused(Fused):
    """The same with shards as they lie: ``[gate_r | up_r]`` on every rank, summed at the end."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        dist.all_reduce(out)
        return out


class _LocalWeights:
    """A layer that multiplies with its own shard, as transformers' packed layers do."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.module.weight.to_local())  # type: ignore[operator, union-attr]


def _strided() -> list[Any]:
    torch.manual_seed(0)
    plain = Fused()
    x = torch.randn(3, 5, 8)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = LocalFused()
    model.load_state_dict(plain.state_dict())
    placements = {"gate_up": _StridedShard(0, split_factor=2), "down": Shard(1)}
    for name, placement in placements.items():
        layer = getattr(model, name)
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [placement]))
        layer.forward = _LocalWeights(layer)
    seen: dict[str, Tensor] = {}

    def order(x: Tensor) -> Tensor:
        return x * torch.arange(1.0, x.shape[-1] + 1)

    plain.gate_up.register_forward_hook(lambda m, a, o: seen.__setitem__("gate_up", o.detach()) or order(o))
    want = plain(x)
    fm = FlexModel(model)
    with torch.no_grad(), fm.capture("gate_up", deliver="all") as acts, fm.edit("gate_up", order):
        got = fm(x)
    main = relative_error(acts["gate_up"], seen["gate_up"]) < 1e-6
    with torch.no_grad(), fm.capture("gate_up", deliver="local") as acts:
        fm(x)
    with torch.no_grad(), fm.capture("after") as later:
        fm(x)
    try:
        later["after"]
        refused = ""
    except LayoutError as error:
        refused = str(error)
    local = acts["gate_up"]
    assert isinstance(local, DTensor)
    return [main, relative_error(got, want) < 1e-5, tuple(local.shape), "fused projection" in refused]


def test_strided_projection() -> None:
    assert run_world(2, _strided) == [[True, True, (3, 5, 24), True]] * 2


def _decode(tp: bool, path: str) -> list[Any]:
    import transformers
    from transformers.distributed import DistributedConfig

    plain = models.make("llama")
    if tp:
        model = transformers.LlamaForCausalLM.from_pretrained(
            path, distributed_config=DistributedConfig(tp_size=2), attn_implementation="eager"
        ).eval()
    else:
        model = engines.fully_sharded_hf(copy.deepcopy(plain))
    ids = models.inputs("llama")["input_ids"]
    mine = ids if tp else ids.chunk(2)[dist.get_rank()]
    want: dict[str, list[Tensor]] = {}
    sites = ["model.layers.1.mlp.act_fn", "model.layers.0.self_attn.q_proj", "model.layers.0"]

    def steer(x: Tensor) -> Tensor:
        return x + x.roll(1, -1)

    plain.model.layers[0].mlp.register_forward_hook(lambda m, a, o: steer(o))
    for site in sites:
        plain.get_submodule(site).register_forward_hook(
            lambda m, a, o, site=site: want.setdefault(site, []).append((o if isinstance(o, Tensor) else o[0]).clone())
        )
    options = {
        "max_new_tokens": 5,
        "do_sample": False,
        "use_cache": True,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    expected = plain.generate(ids, **options)
    fm = FlexModel(model)
    with fm.edit("model.layers.0.mlp", steer), fm.capture(*sites) as acts:
        got = fm.generate(mine, **options)
    part = expected if tp else expected.chunk(2)[dist.get_rank()]
    errors = [max(relative_error(g, w) for g, w in zip(acts.calls(s), want[s], strict=True)) for s in sites]
    return [torch.equal(got, part), all(e < 1e-4 for e in errors), len(acts.calls(sites[0]))]


def test_decoding_with_a_cache(tmp_path: Any) -> None:
    models.make("llama").save_pretrained(tmp_path)
    assert run_world(2, _decode, True, str(tmp_path)) == [[True, True, 5]] * 2
    assert run_world(2, _decode, False, str(tmp_path)) == [[True, True, 5]] * 2


class Twice(nn.Module):
    """One module fires on the batch, then without a batch dim, then on nothing at all."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out = self.scale(x)
        table = self.scale(torch.arange(32.0).view(4, 8) / 10)
        self.scale(x[:, :0].reshape(x.shape[0], 0, 8))
        return out + table.sum()


def _each_firing(grad: bool) -> list[Any]:
    torch.manual_seed(0)
    plain = Twice()
    full = torch.randn(8, 8)
    want: list[Tensor] = []
    plain.scale.register_forward_hook(lambda m, a, o: want.append(o.detach()) or torch.tanh(o))
    expected = plain(full)
    fm = FlexModel(nn.parallel.DistributedDataParallel(copy.deepcopy(plain)))
    for module in fm.modules():
        module._forward_hooks.clear()
    out = []
    for _ in range(2):
        with torch.set_grad_enabled(grad), fm.capture("scale") as acts, fm.edit("scale", torch.tanh):
            got = fm.full_output(fm(full.chunk(2)[dist.get_rank()]))
        shapes = [tuple(t.shape) for t in acts.calls("scale")]
        equal = all(relative_error(a, b) < 1e-5 for a, b in zip(acts.calls("scale"), want, strict=True))
        out.append([shapes, equal, relative_error(got, expected) < 1e-5])
    return out


def test_each_firing_of_a_module_has_its_own_layout() -> None:
    shapes = [(8, 8), (4, 8), (8, 0, 8)]
    assert run_world(2, _each_firing, True) == [[[shapes, True, True]] * 2] * 2


def _kinds_of_call() -> list[Any]:
    """A position table has a batch dim if the call is given positions, and none if not."""
    plain = models.make("gpt2")
    ids = models.inputs("gpt2")["input_ids"]
    given = {"input_ids": ids, "position_ids": torch.arange(6).expand(4, 6).contiguous()}
    fm = FlexModel(nn.parallel.DistributedDataParallel(copy.deepcopy(plain)))
    shapes = []
    plain.transformer.wpe.register_forward_hook(lambda m, a, o: shapes.append(tuple(o.shape)))
    got = []
    for batch in ({"input_ids": ids}, given, {"input_ids": ids}):
        plain(**batch)
        with fm.capture("transformer.wpe") as acts:
            fm(**{k: v.chunk(2)[dist.get_rank()] for k, v in batch.items()})
        got.append(tuple(acts["transformer.wpe"].shape))
    return [got == shapes, got]


def test_calls_of_another_kind_are_looked_at_anew() -> None:
    assert run_world(2, _kinds_of_call) == [[True, [(1, 6, 32), (4, 6, 32), (1, 6, 32)]]] * 2


class SortedByExpert(nn.Module):
    """Rows of both choices of every token, all first choices before all second ones."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.expert(torch.cat([x, x])).view(2, *x.shape).sum(0)


def _order_unseen() -> str:
    fm = FlexModel(nn.parallel.DistributedDataParallel(SortedByExpert()))
    with fm.capture("expert") as acts:
        fm(torch.randn(2, 8))
    try:
        return str(acts["expert"])
    except LayoutError as error:
        return str(error)


def test_rows_that_repeat_show_no_order() -> None:
    assert all("repeat themselves" in said or "do not follow" in said for said in run_world(2, _order_unseen))


def _parts_kept() -> list[bool]:
    """Parts are copies: what is delivered later, through the same buffers, does not change them."""
    fm = FlexModel(engines.place("ddp", models.net()).model)
    kept = []
    with fm.capture("layers.0") as acts:
        for seed in range(2):
            torch.manual_seed(seed)
            fm(torch.randint(0, 32, (2, 4 + dist.get_rank())))
            fm.flush()
            value = acts.calls("layers.0")[-1]
            kept.append((value, [t.clone() for t in value.tensors]))
    return [torch.equal(a, b) for value, copies in kept for a, b in zip(value.tensors, copies, strict=True)]


def test_parts_are_copies() -> None:
    assert run_world(2, _parts_kept) == [[True] * 4] * 2
