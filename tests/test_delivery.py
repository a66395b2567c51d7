"""Delivery: which bytes move, how many collectives run, and that what moves nothing really moves nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import engines
import models
import pytest
import torch
import torch.distributed as dist
from oracle import relative_error
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode
from worlds import run_world

from flex_model import FlexModel, HookFunction, edits

SHARDED, REPLICATED = "layers.0.mlp.act", "layers.0.norm"  # under "tp"


class Wire(AbstractContextManager["Wire"]):
    """Counts the messages and bytes of this library's point-to-point and gather calls, by standing in for torch's."""

    names = ("send", "isend", "irecv", "recv", "all_gather_single", "all_gather_into_tensor", "all_gather_object")

    def __init__(self) -> None:
        self.sent = 0
        self.calls: list[str] = []

    def __enter__(self) -> Wire:
        from flex_model.routing import collectives, moves

        self.kept = [(dist, n, getattr(dist, n)) for n in self.names if hasattr(dist, n)]
        self.kept += [(m, "all_gather_flat", m.all_gather_flat) for m in (collectives, moves)]
        for owner, name, original in self.kept:
            setattr(owner, name, self.watch(name, original))
        return self

    def watch(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            if name in ("send", "isend"):
                self.sent += args[0].numel() * args[0].element_size()
            return original(*args, **kwargs)

        return call

    def __exit__(self, *_: object) -> None:
        for owner, name, original in self.kept:
            setattr(owner, name, original)


def _to_main(site: str) -> tuple[int, list[str], int]:
    placed = engines.place("tp", models.net())
    output: dict[str, list[Tensor]] = {}
    fm = FlexModel(placed.model, output)
    fm.register_forward_hook(HookFunction(site))
    full = models.tokens()
    fm(full)  # layouts are found
    with Wire() as wire:
        fm(full)
    return wire.sent, wire.calls, len(output.get(site, []))


def test_main_gets_the_other_ranks_shards_and_no_byte_more() -> None:
    results = run_world(2, _to_main, SHARDED)
    assert sum(sent for sent, _, _ in results) == 4 * 6 * 8 * 4  # (4, 6, 16/2) in float32
    assert [count for _, _, count in results] == [2, 0]
    assert [calls.count("send") + calls.count("irecv") for _, calls, _ in results] == [1, 1]


def test_replicated_values_move_nothing() -> None:
    results = run_world(2, _to_main, REPLICATED)
    assert [(sent, calls) for sent, calls, _ in results] == [(0, [])] * 2
    assert [count for _, _, count in results] == [2, 0]


def _uneven_to_main() -> tuple[int, Any]:
    full = models.tokens(batch=5)
    mine = full[:3] if dist.get_rank() == 0 else full[3:]
    fm = FlexModel(engines.place("ddp", models.net()).model)
    with fm.capture(SHARDED, deliver="main"):
        fm(mine)
    with Wire() as wire, fm.capture(SHARDED, deliver="main") as acts:
        fm(mine)
    here = tuple(acts[SHARDED].shape) if dist.get_rank() == 0 else None
    return wire.sent, here


def test_uneven_batches_to_main() -> None:
    first, second = run_world(2, _uneven_to_main)
    assert first == (0, (5, 6, 16))
    assert second == (2 * 6 * 16 * 4, None)


def _no_rows() -> tuple[int, ...]:
    full = models.tokens(batch=3)
    mine = full if dist.get_rank() == 0 else full[:0]
    fm = FlexModel(engines.place("ddp", models.net()).model, deliver="all")
    keywords: dict[str, Any] = {"layout": {"dp": Shard(0)}}
    fm.register_forward_hook(HookFunction(SHARDED, (3, None, None), **keywords))
    fm(mine)
    return tuple(fm.output_ptr[SHARDED][0].shape)


def test_a_rank_without_rows_knows_the_full_shape() -> None:
    assert run_world(2, _no_rows) == [(3, 6, 16)] * 2


def _four_to_main() -> int:
    placed = engines.place("2d_tp", models.net())
    fm = FlexModel(placed.model)
    mine = placed.mine(models.tokens())
    with fm.capture(SHARDED, REPLICATED, deliver="main"):
        fm(mine)
    with Wire() as wire, fm.capture(SHARDED, REPLICATED, deliver="main"):
        fm(mine)
    return wire.sent


def test_each_distinct_shard_is_sent_once() -> None:
    act, norm = 4 * 6 * 16 * 4, 4 * 6 * 8 * 4  # global bytes: split over 4 ranks, and over the 2 data ranks
    assert sum(run_world(4, _four_to_main)) == act * 3 // 4 + norm // 2


def _local() -> tuple[Any, ...]:
    fm = FlexModel(engines.place("tp", models.net()).model)
    full = models.tokens()
    with fm.capture(SHARDED, deliver="local"):
        fm(full)
    with Wire() as wire, fm.capture(SHARDED, deliver="local") as acts:
        fm(full)
    value = acts[SHARDED]
    assert isinstance(value, DTensor)
    whole = value.full_tensor()
    with fm.capture(SHARDED) as again:
        fm(full)
    return wire.calls, tuple(value.shape), torch.equal(whole, again[SHARDED])


def test_local_keeps_shards_as_dtensors() -> None:
    assert run_world(2, _local) == [([], (4, 6, 16), True)] * 2


def _select(index: Any) -> tuple[int, bool]:
    fm = FlexModel(engines.place("tp", models.net()).model)
    full = models.tokens()
    with fm.capture(SHARDED) as everything:
        fm(full)
    with fm.capture(SHARDED, select=index, deliver="main"):
        fm(full)
    with Wire() as wire, fm.capture(SHARDED, select=index, deliver="main") as acts:
        fm(full)
    want = index(everything[SHARDED]) if callable(index) else everything[SHARDED][index]
    return wire.sent, dist.get_rank() > 0 or torch.equal(acts[SHARDED], want)


@pytest.mark.parametrize("select", [(slice(None), -1), lambda x: x[:, -1], lambda x: x.select(1, 5)])
def test_a_selection_is_made_before_anything_moves(select: Any) -> None:
    results = run_world(2, _select, select)
    assert sum(sent for sent, _ in results) == 4 * 8 * 4  # one position of six
    assert all(equal for _, equal in results)


@pytest.mark.parametrize("select", [(..., 3), (..., slice(2, 11)), lambda x: x[..., [1, 9]], lambda x: x.mean(-1)])
def test_a_selection_of_the_sharded_dim_is_global(select: Any) -> None:
    assert all(equal for _, equal in run_world(2, _select, select))


def _edit_collectives(engine: str, site: str, run: str, edit: Any) -> tuple[int, int]:
    placed = engines.place(engine, models.net())
    fm = FlexModel(placed.model)
    mine = placed.mine(models.tokens())

    def count() -> int:
        with CommDebugMode() as comm:
            fm(mine)
        return int(comm.get_total_counts())

    fm(mine)
    bare = count()
    with fm.edit(site, edits.scale(2.0) if edit is None else edit, run=run):
        fm(mine)
        return count() - bare, bare


def _double(x: Tensor) -> Tensor:
    return x * 2


@pytest.mark.parametrize(
    ("engine", "site", "run", "edit", "more"),
    [
        ("tp", SHARDED, "sharded", None, 0),  # a preset of single elements has nothing to say
        ("tp", SHARDED, "sharded", _double, 1),  # the status exchange at the end of the forward
        ("tp", REPLICATED, "every_rank", None, 1),
        ("tp", SHARDED, "every_rank", None, 2),  # and one all-gather
        ("fsdp2", SHARDED, "sharded", None, 0),
        ("fsdp2", SHARDED, "sharded", _double, 2),  # are all batches equal?
        ("fsdp2", SHARDED, "every_rank", None, 3),
    ],
)
def test_collectives_of_an_edit(engine: str, site: str, run: str, edit: Any, more: int) -> None:
    assert [extra for extra, _ in run_world(2, _edit_collectives, engine, site, run, edit)] == [more] * 2


class _Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view_as(x)


def _large() -> tuple[int, list[str], bool]:
    """Two large values of one forward and a small one."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    output: dict[str, list[Tensor]] = {}
    fm = FlexModel(nn.Sequential(_Half(), _Half()), output, mesh=mesh)
    for name in ("0", "1"):
        fm.register_forward_hook(HookFunction(name, layout={"tp": Shard(2)}))
    whole = torch.randn((4, 1024, 1024), generator=torch.Generator().manual_seed(0))
    mine = whole.chunk(2, 2)[dist.get_rank()].contiguous()
    with torch.no_grad(), Wire() as wire:
        fm(mine)
    right = all(torch.equal(output[n][0], whole) for n in ("0", "1")) if dist.get_rank() == 0 else not output
    return wire.sent, [c for c in wire.calls if c in ("send", "isend", "irecv")], right


def test_large_values_go_in_pieces_and_no_byte_more() -> None:
    (sent, received, right), (given, sends, nothing) = run_world(2, _large)
    assert right and nothing and sent == 0 and given == 2 * 4 * 1024 * 512 * 4
    assert received == ["irecv"] * 4 and sends == ["isend"] * 4  # of four MiB each


def _read_only(engine: str) -> list[str]:
    """Outputs and gradients with a hook on every module, bit for bit those without."""
    results = []
    for hooked in (False, True):
        placed = engines.place(engine, models.net())
        fm = FlexModel(placed.model)
        if hooked:
            for name in dict.fromkeys(row.name for row in fm.sites() if row.name):
                fm.register_forward_hook(HookFunction(name))
        output = fm(placed.mine(models.tokens()))
        engines.local_loss(engine, output).backward()
        grads = {n: engines.whole(p.grad) for n, p in fm.named_parameters() if p.grad is not None}
        results.append({"output": engines.whole(output.detach()), **grads})
    plain, watched = results
    return [n for n in plain if not torch.equal(plain[n], watched[n])] + sorted(set(plain) ^ set(watched))


@pytest.mark.parametrize("engine", [e for e in engines.TWO_RANKS if e != "tp_local_head"])
def test_reading_changes_no_bit(engine: str) -> None:
    assert run_world(2, _read_only, engine) == [[]] * 2


def _by_run(engine: str) -> dict[str, list[float]]:
    placed = engines.place(engine, models.net())
    fm, mine = FlexModel(placed.model), placed.mine(models.tokens())
    with torch.no_grad():
        acts = fm.capture("layers.*.mlp").run(mine)
        edited = fm.full_output(fm.edit("layers.0.mlp", edits.zero([1])).run(mine))
    return {name: x.flatten().tolist() for name, x in {**acts, "edited": edited}.items()}


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "tp"])
def test_run_gives_the_whole_of_one_call(engine: str) -> None:
    plain, edited, expected = models.net(), models.net(), {}
    for name in ("layers.0.mlp", "layers.1.mlp"):
        plain.get_submodule(name).register_forward_hook(lambda m, a, o, n=name: expected.update({n: o}))
    edited.layers[0].mlp.register_forward_hook(lambda m, a, o: o.index_fill(-1, torch.tensor([1]), 0))
    with torch.no_grad():
        plain(models.tokens())
        expected["edited"] = edited(models.tokens())
    for found in run_world(2, _by_run, engine):
        assert found.keys() == expected.keys()
        assert all(relative_error(torch.tensor(v), expected[n].flatten()) < 1e-5 for n, v in found.items())
