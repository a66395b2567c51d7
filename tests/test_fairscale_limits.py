"""What fairscale's layers do not tell: sizes that a user's module keeps, and parallel layers of a user's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import fairscale_models
import models
import pytest
import torch
from fairscale.nn.model_parallel import initialize as fs_init
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear
from fairscale.nn.model_parallel.mappings import copy_to_model_parallel_region, gather_from_model_parallel_region
from oracle import relative_error
from test_delivery import Wire
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from worlds import run_world

from flex_model import DummyModule, FlexModel, HookFunction
from flex_model.errors import LayoutError, MeshError

WIDTH, HEADS = 8, 4


class Heads(nn.Module):
    """An attention without attention: what is made of the heads tells how they were counted."""

    def __init__(self) -> None:
        super().__init__()
        self.into = ColumnParallelLinear(WIDTH, WIDTH, bias=False, gather_output=False)
        self.out = RowParallelLinear(WIDTH, WIDTH, bias=False, input_is_parallel=True)
        self.split, self.joined = DummyModule(), DummyModule()

    def forward(self, x: Tensor) -> Tensor:
        y = self.split(self.into(x).unflatten(-1, (self.local, -1)))  # (B, S, heads / tp, head)
        return self.out(self.joined((y * y.sigmoid()).flatten(2)))


class Divides(Heads):
    def __init__(self) -> None:
        super().__init__()
        self.local = HEADS // fs_init.get_model_parallel_world_size()


class DividesIfSetUp(Heads):
    def __init__(self) -> None:
        super().__init__()
        ranks = fs_init.get_model_parallel_world_size() if fs_init.model_parallel_is_initialized() else 1
        sizes = [HEADS // ranks, WIDTH]
        self.local, self.width = HEADS // ranks, sizes[1]


class AsksGroup(Heads):
    def __init__(self) -> None:
        super().__init__()
        self.group = fs_init.get_model_parallel_group()
        self.local = int(HEADS / torch.distributed.get_world_size(self.group))


class AsksLater(Heads):
    @property
    def local(self) -> int:
        return HEADS // fs_init.get_model_parallel_world_size()


class AtLeastOne(Heads):
    """Not understood: what it is without the ranks depends on more than their number."""

    def __init__(self) -> None:
        super().__init__()
        self.local = max(1, HEADS // fs_init.get_model_parallel_world_size())


class Told(Heads):
    """Its source does not say that the number is a local one."""

    def __init__(self, local: int) -> None:
        super().__init__()
        self.local = local


def made_of_strings() -> nn.Module:
    """A class without source."""
    scope: dict[str, Any] = {"Heads": Heads, "fs_init": fs_init, "HEADS": HEADS}
    code = (
        "class Hidden(Heads):\n    def __init__(self):\n        super().__init__()\n"
        "        self.local = HEADS // fs_init.get_model_parallel_world_size()\n"
    )
    exec(code, scope)
    return scope["Hidden"]()


def wrapped(make: Callable[[], nn.Module], keep_class: bool = False) -> tuple[nn.Module, nn.Module]:
    """A model around the module, and the plain one."""
    fairscale_models.start()
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(WIDTH), make(), nn.Tanh())
    group, model[1].__dict__["group"] = model[1].__dict__.get("group"), None
    plain = copy.deepcopy(model)
    model[1].__dict__["group"] = group
    for name in ("1.into", "1.out"):
        plain.set_submodule(name, nn.Linear(WIDTH, WIDTH, bias=False))
    plain[1].__class__ = type(plain[1]) if keep_class else Heads
    plain[1].__dict__["local"] = HEADS
    return fairscale_models.fill(model, plain), plain


def _captured(make: Callable[[], nn.Module], keep_class: bool = False) -> list[str]:
    """What is wrong or refused of the sites in and around the module."""
    model, plain = wrapped(make, keep_class)
    x = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(2))
    fm = FlexModel(model)
    names = ["0", "1.into", "1.split", "1.joined", "1", "2"]
    seen: dict[str, Tensor] = {}
    for name in names:
        plain.get_submodule(name).register_forward_hook(lambda m, a, o, name=name: seen.__setitem__(name, o))
    plain(x)
    bad = []
    with fm.capture(names) as acts:
        fm(x)
    for name in names:
        try:
            if relative_error(acts[name], seen[name]) > 1e-5:
                bad.append(f"{name}: wrong")
        except LayoutError as error:
            bad.append(f"{name}: {error}")
    return bad


@pytest.mark.parametrize("make", [Divides, DividesIfSetUp, AsksGroup, AsksLater])
def test_sizes_that_a_module_keeps(make: Callable[[], nn.Module]) -> None:
    assert run_world(2, _captured, make) == [[]] * 2


@pytest.mark.parametrize("make", [AtLeastOne, made_of_strings, lambda: Told(HEADS // 2)])
def test_sizes_that_cannot_be_known(make: Callable[[], nn.Module]) -> None:
    for bad in run_world(2, _captured, make):
        assert not any("wrong" in b for b in bad) and any(b.startswith("1.split") for b in bad)
        print(bad[0])


# -- layers that are not fairscale's -----------------------------------------------------------------------------
class OwnColumn(nn.Module):
    """A parallel layer of a user's own."""

    def __init__(self, gather: bool) -> None:
        super().__init__()
        self.gather = gather
        self.weight = nn.Parameter(torch.empty(WIDTH // fs_init.get_model_parallel_world_size(), WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = copy_to_model_parallel_region(x) @ self.weight.T
        return gather_from_model_parallel_region(y) if self.gather else y


class OwnNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = ColumnParallelLinear(WIDTH, WIDTH, bias=False, gather_output=False)
        self.act = nn.Tanh()
        self.second = RowParallelLinear(WIDTH, WIDTH, bias=False, input_is_parallel=True)
        self.own = OwnColumn(gather=False)
        self.own_act = nn.Tanh()
        self.third = RowParallelLinear(WIDTH, WIDTH, bias=False, input_is_parallel=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.own_act(self.own(self.second(self.act(self.first(x))))))


def own_net() -> tuple[nn.Module, nn.Module, Tensor]:
    fairscale_models.start()
    torch.manual_seed(0)
    model = OwnNet()
    plain = copy.deepcopy(model)
    for name in ("first", "second", "own", "third"):
        plain.set_submodule(name, nn.Linear(WIDTH, WIDTH, bias=False))
    with torch.no_grad():
        model.own.weight.copy_(fairscale_models.part(plain.own.weight, 0))
    own, model.own = model.own, nn.Identity()
    fairscale_models.fill(model, plain)
    model.own = own
    return model, plain, torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(2))


def _own_layer() -> list[str]:
    model, plain, x = own_net()
    want: dict[str, Tensor] = {}
    for name, module in plain.named_children():
        module.register_forward_hook(lambda m, a, o, name=name: want.__setitem__(name, o.detach()))
    plain(x)
    bad = []
    fm = FlexModel(model)
    with fm.capture("*") as acts:
        fm(x)
    for name in ("first", "act", "second", "third"):  # before it, and where fairscale's own layers say
        if relative_error(acts[name], want[name]) > 1e-5:
            bad.append(f"{name} is wrong")
    for name in ("own", "own_act"):
        try:
            bad.append(f"{name} was not refused but {tuple(acts[name].shape)}")
        except LayoutError as error:
            if "own (OwnColumn)" not in str(error) or "layout={'tp'" not in str(error):
                bad.append(str(error))
    try:
        bad.append(f"the parameter was not refused but {tuple(fm.get_module_parameter('own.weight').shape)}")
    except LayoutError as error:
        if "OwnColumn" not in str(error):
            bad.append(str(error))
    told: dict[str, Any] = {"layout": {"tp": Shard(2)}}
    for keywords in (told, {"expected_shape": (None, None, WIDTH)}):
        again = FlexModel(own_net()[0], deliver="all")
        for name in ("own", "own_act"):
            again.register_forward_hook(HookFunction(name, **keywords))
        again(x)
        for name in ("own", "own_act"):
            if relative_error(again.output_ptr[name][0], want[name]) > 1e-5:
                bad.append(f"{name} with {keywords} is wrong")
    return bad


def test_a_parallel_layer_of_the_users_own() -> None:
    assert run_world(2, _own_layer) == [[]] * 2


def _wrong_override() -> str:
    model, _, x = own_net()
    fm = FlexModel(model)
    fm.register_forward_hook(HookFunction("own", layout={"tp": Replicate()}))
    with pytest.raises(LayoutError) as caught:
        fm(x)
    return str(caught.value)


def test_a_wrong_override_is_refused() -> None:
    assert all("should be the same along 'tp'" in message for message in run_world(2, _wrong_override))


# -- costs and sizes ---------------------------------------------------------------------------------------------
def _wire(site: str) -> tuple[int, list[str]]:
    model, _ = fairscale_models.llama()
    fm = FlexModel(model)
    fm.register_forward_hook(HookFunction(site))
    full = models.tokens()
    fm(full)  # layouts are found
    with Wire() as wire:
        fm(full)
    assert len(fm.output_ptr.get(site, [])) == (2 if torch.distributed.get_rank() == 0 else 0)
    return wire.sent, wire.calls


@pytest.mark.parametrize("site", ["layers.0", "layers.1.attention", "tok_embeddings", "norm", "output"])
def test_replicated_values_move_nothing(site: str) -> None:
    assert run_world(2, _wire, site) == [(0, [])] * 2


@pytest.mark.parametrize("site", ["layers.0.feed_forward.act", "layers.0.feed_forward.w1"])
def test_sharded_values_move_once(site: str) -> None:
    results = run_world(2, _wire, site)
    assert sum(sent for sent, _ in results) == 4 * 6 * 12 * 4  # (4, 6, 24 / 2) in float32
    assert [calls.count("send") + calls.count("irecv") for _, calls in results] == [1, 1]


def _decoding(ddp: bool) -> list[str]:
    """A cache of local heads: a prefill and three steps."""
    model, plain = fairscale_models.llama(cached=True)
    full = models.tokens(length=9)
    mine = fairscale_models.batch_part(full)
    names = ["layers.0.attention.scores", "layers.1.attention", "layers.1.feed_forward.w1"]
    want: dict[str, list[Tensor]] = {n: [] for n in names}
    for name in names:
        plain.get_submodule(name).register_forward_hook(lambda m, a, o, name=name: want[name].append(o.detach()))
    fm = FlexModel(fairscale_models.with_ddp(model) if ddp else model, deliver="all")
    for name in names:
        fm.register_forward_hook(HookFunction(name))
    with torch.inference_mode():
        for start, end in ((0, 6), (6, 7), (7, 8), (8, 9)):
            plain(full[:, start:end], start)
            fm(mine[:, start:end], start)
    fm.flush()
    bad = []
    for name in names:
        got = fm.output_ptr[name]
        if len(got) != 4 or any(relative_error(g, w) > 1e-5 for g, w in zip(got, want[name], strict=True)):
            bad.append(f"{name}: {[tuple(g.shape) for g in got]}")
    return bad


@pytest.mark.parametrize(("ranks", "ddp"), [(2, False), (4, False), (4, True)])
def test_decoding_with_a_cache(ranks: int, ddp: bool) -> None:
    assert run_world(ranks, _decoding, ddp) == [[]] * ranks


def _sizes() -> list[str]:
    model, _ = fairscale_models.llama()
    given = {"tensor_parallel_size": 2, "pipeline_parallel_size": 1, "data_parallel_size": 2}
    fm = FlexModel(fairscale_models.with_ddp(model), **given)
    with pytest.raises(MeshError, match="tensor_parallel_size=4"):
        FlexModel(model, tensor_parallel_size=4)
    return [*fm._runtime.mesh.names, *map(str, fm._runtime.mesh.ranks)]


def test_sizes_given() -> None:
    assert run_world(4, _sizes) == [["dp", "tp", "0", "1", "2", "3"]] * 4


def _fsdp() -> str:
    from torch.distributed.fsdp import fully_shard

    model, _ = fairscale_models.llama()
    with pytest.raises(LayoutError) as caught:
        FlexModel(fully_shard(model))
    return str(caught.value)


def test_under_fsdp_it_is_refused() -> None:
    assert all("under FSDP" in message for message in run_world(2, _fsdp))


class Squashed(ColumnParallelLinear):
    """A subclass with a forward of its own: only the twin can tell what it returns."""

    def forward(self, x: Tensor) -> Tensor:
        return gather_from_model_parallel_region(super().forward(x).tanh())


def _subclass() -> list[tuple[int, ...]]:
    fairscale_models.start()
    model = nn.Sequential(nn.LayerNorm(WIDTH), Squashed(WIDTH, WIDTH, gather_output=False), nn.Tanh())
    fm = FlexModel(model)
    with fm.capture("*") as acts:
        out = fm(torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(2)))
    assert torch.equal(acts["2"], out)
    full = fm.get_module_parameter("1.weight")
    assert torch.equal(fairscale_models.part(full, 0), model[1].weight)
    return [tuple(acts[n].shape) for n in ("0", "1", "2")]


def test_a_subclass_with_its_own_forward() -> None:
    assert run_world(2, _subclass) == [[(2, 3, WIDTH)] * 3] * 2


# -- what is moved within a module -------------------------------------------------------------------------------
class Merges(Heads):
    """Batch and heads in one dim, as some attentions do, and apart again."""

    def __init__(self) -> None:
        super().__init__()
        self.local = HEADS // fs_init.get_model_parallel_world_size()

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        y = self.into(x).view(b, s, self.local, -1).transpose(1, 2).reshape(b * self.local, s, -1)
        y = (y * y.sigmoid()).view(b, self.local, s, -1).transpose(1, 2)
        return self.out(self.joined(self.split(y).flatten(2)))


class HeadsLast(Divides):
    """Joins the heads where they are not the outer dim: their order is lost."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.into(x).unflatten(-1, (self.local, -1)).transpose(2, 3)
        return self.out(
            self.split(self.joined(y.flatten(2)).unflatten(-1, (-1, self.local))).transpose(2, 3).flatten(2)
        )


def test_heads_that_move_with_the_batch() -> None:
    for bad in run_world(2, _moved, Merges):
        assert bad == []


def test_heads_out_of_order() -> None:
    for bad in run_world(2, _moved, HeadsLast):
        assert len(bad) == 1 and bad[0].startswith("1.joined: 1.joined output 0") and "order of the ranks" in bad[0]


def _moved(make: Callable[[], nn.Module]) -> list[str]:
    return _captured(make, keep_class=True)
