"""A rank among 1,024 on a mesh of five axes: what it keeps and sends does not grow with the number of ranks.

The world is fake, so that shapes, counts and bytes are real and values are not. That refusals are everybody's, and that
values are right, is shown with real processes: here on four ranks, and in test_shapes and test_defects.
"""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from fake_world import (
    AXES,
    CountCollectives,
    CountKernels,
    Deep,
    Moved,
    fake_world,
    inputs,
    mesh_of,
    python_memory,
    spread,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from worlds import run_world

from flex_model import FlexModel
from flex_model.errors import LayoutError
from flex_model.layout.mesh import Axis, ModelMesh
from flex_model.layout.meta_results import makes_new
from flex_model.routing.delivery import deliver, exchange_shapes
from flex_model.routing.item import Item
from flex_model.routing.memory import Memory

LAYERS, LOCAL, LENGTH, BATCH = 20, 12, 3, 2
SIZES = (2, 3, 4)  # of each of the five axes: 32, 243 and 1,024 ranks


def _run(size: int, rank: int, way: str) -> tuple[dict[str, tuple[int, ...]], Moved, int, list[Any]]:
    """({site: shape}, what moved, the most memory that Python objects took, the plan) of one captured call."""
    with fake_world(size**5, rank):
        mesh = mesh_of((size,) * 5)
        fm = FlexModel(spread(Deep(LAYERS, LOCAL * size), mesh), mesh=mesh)
        fm._runtime.mesh.prepare()  # groups: torch itself keeps a list of the members of each
        mine = inputs(mesh, BATCH, LENGTH)
        with torch.no_grad(), fm.capture("table", "layers.*", deliver=way) as acts:
            with CountCollectives() as counter, python_memory() as peak:
                fm(*mine)
            plan = fm.plan()
        shapes = {n: tuple(acts[n].shape) for n in ("table", "layers.0", "layers.1")} if way == "local" else {}
        return shapes, counter.moved, peak[0], plan


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rank", [0, 3, -1])
def test_global_shapes(size: int, rank: int) -> None:
    shapes, _, _, plan = _run(size, rank % size**5, "local")
    batch, width = BATCH * size * size, LOCAL * size
    assert shapes == {"table": (5, width), **dict.fromkeys(("layers.0", "layers.1"), (batch, LENGTH * size, width))}
    rows = {row.name: row.layout for row in plan}
    assert rows["table"] == "dp_replicate: R, fsdp: R, cp: R, ep: R, tp: S(1)"
    assert rows["layers.0"] == "dp_replicate: S(0), fsdp: S(0), cp: S(1), ep: R, tp: S(2)"
    assert rows["layers.1"] == "dp_replicate: S(0), fsdp: S(0), cp: S(1), ep: R, tp: R"
    assert not any(row.refusal for row in plan)


def test_inference_does_not_grow_with_the_number_of_ranks() -> None:
    _run(2, 1, "main")  # what is made once
    runs = {size**5: _run(size, 1, "main") for size in SIZES}
    moved = {ranks: run[1] for ranks, run in runs.items()}
    memory = {ranks: run[2] for ranks, run in runs.items()}
    print("collectives, bytes and Python memory by ranks:", moved, memory)
    assert moved[1024] == moved[32]
    assert memory[1024] < 1.2 * memory[32]


def test_inference_of_many_equal_layers() -> None:
    """What sites share is made once: no kernel of torch's is asked again for another layer, and no layout is made."""
    asked, layouts, kept = {}, {}, {}
    for layers in (LAYERS, 2 * LAYERS):
        with fake_world(32, 1), torch.no_grad():
            mesh = mesh_of((2,) * 5)
            fm = FlexModel(spread(Deep(layers, LOCAL * 2), mesh), mesh=mesh)
            fm._runtime.mesh.prepare()
            with fm.capture("table", "layers.*", deliver="main"), CountKernels() as kernels:
                fm(*inputs(mesh, BATCH, LENGTH))
            found = fm._runtime.inference.known
            assert len(found) == layers + 1 and not any(row.refusal for row in fm.plan())
            asked[layers] = {func: n for func, n in kernels.asked.items() if makes_new(func)}
            layouts[layers] = len({id(layout) for layout in found.values()})
            kept[layers] = len({id(p) for layout in found.values() for p in layout.placements})
    assert asked[LAYERS] == asked[2 * LAYERS] and asked[LAYERS]
    assert layouts == {LAYERS: 3, 2 * LAYERS: 3}  # of the table and of two kinds of layers
    assert kept[LAYERS] == kept[2 * LAYERS]


@pytest.mark.parametrize("way", ["main", "all"])
def test_delivery_to_others_does_not_grow(way: str) -> None:
    """A rank that is not main sends its own shards; to all, a value goes along the lines of its own axes only."""
    grid = {}
    for tensor in (32, 1024):
        with fake_world(tensor, 3):
            axes = [Axis("cp", "tensor", tuple(range(3, tensor, 4))), Axis("tp", "tensor", (0, 1, 2, 3))]
            mesh = ModelMesh(axes, torch.arange(tensor).view(-1, 4), timeout=dist.default_pg_timeout)
            mesh.prepare()
            grid[tensor] = _delivered(mesh, way)
    assert grid[1024] == grid[32]


def _delivered(mesh: ModelMesh, way: str) -> tuple[Moved, list[tuple[int, ...]]]:
    from torch.distributed.tensor import Replicate, Shard

    from flex_model.layout.layout import Layout

    got: list[Any] = []
    layout = Layout((Replicate(), Shard(1)), "", ragged=(False, False))
    items = [Item(str(i), torch.randn(5, 8), layout, way, got.append) for i in range(10)]  # type: ignore[arg-type]
    with CountCollectives() as counter:
        deliver(items, mesh, Memory(), lambda value: value, lambda: None)
    assert [tuple(t.shape) for t in got] == ([] if way == "main" else [(5, 32)] * 10)
    return counter.moved, [tuple(i.shapes[mesh.size - 1]) for i in items if i.shapes is not None]


def test_shapes_that_are_the_same_are_kept_once() -> None:
    moved = {}
    for ranks in (32, 1024):
        with fake_world(ranks, 3):
            mesh = ModelMesh([Axis("dp", "data", tuple(range(ranks)))], timeout=dist.default_pg_timeout)
            mesh.prepare()
            with CountCollectives() as counter, python_memory() as peak:
                shapes = exchange_shapes([(2, 3, 4)] * 1000, mesh)
            moved[ranks] = counter.moved
            assert len(shapes) == 1000 and len(shapes[0]) == ranks and shapes[0][ranks - 1] == (2, 3, 4)
            assert peak[0] < 1e6
    assert moved[1024] == moved[32]


def test_coordinates_are_counted() -> None:
    with fake_world(1024, 700):
        mesh = FlexModel(nn.Linear(2, 2), mesh=mesh_of((4,) * 5))._runtime.mesh
        for rank in (0, 1, 5, 700, 1023):
            coordinate = mesh.coordinate_of(rank)
            assert mesh.group_rank(coordinate) == rank and int(mesh.grid[coordinate]) == rank
        assert mesh.coordinate == mesh.coordinate_of(mesh.me) and mesh.names == AXES
        assert [mesh.ranks[r] for r in mesh.line(4)] == [700, 701, 702, 703]
        assert [mesh.ranks[r] for r in mesh.line(0)] == [188, 444, 700, 956]


# -- real ranks ------------------------------------------------------------------------------------------------
class Odd(nn.Module):
    """One rank of four meets another value, or another number of dims, than the others."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.body = models.MLP()
        self.site = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        odd = dist.get_rank() == 3
        if self.how == "value":
            self.site(x + odd)
        elif self.how == "dims":
            self.site(x[0] if odd else x)
        elif self.how == "size":
            self.site(x[..., :-1] if odd else x)
        elif not odd:
            self.site(x)
        return x


def _refused(how: str) -> list[str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "tp"))
    torch.manual_seed(0)
    model = Odd(how)
    parallelize_module(model, mesh["tp"], {"body.up": ColwiseParallel(), "body.down": RowwiseParallel()})
    fm = FlexModel(model, mesh=mesh)
    said = []
    with torch.no_grad(), fm.capture("site", "body.up", deliver="all") as acts:
        fm(torch.randn(2, 3, 8))
    try:
        said.append(str(tuple(acts["site"].shape)))
    except LayoutError as error:
        said.append(str(error))
    return [*said, str(tuple(acts["body.up"].shape))]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("value", "should be the same along"),
        ("dims", "fired on some ranks but not on ranks"),
        ("size", "should be the same along"),
        ("never", "ran on some ranks and not on others"),
    ],
)
def test_one_rank_refuses_for_all(how: str, reason: str) -> None:
    """Rank 3 alone is odd; every rank gets the same error, which names it; other values are whole."""
    if how == "never":
        with pytest.raises(AssertionError, match="ranks captured different values in this call"):
            run_world(4, _refused, how)
        return
    told = run_world(4, _refused, how)
    assert all(reason in said for said, _ in told)
    assert how == "dims" or (len({said for said, _ in told}) == 1 and "3: (" in told[0][0])  # the same words
    assert all(whole == "(2, 3, 16)" for _, whole in told)
