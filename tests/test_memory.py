"""Memory of captures that were let go serves the next ones, and never while anybody can still see it."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from worlds import run_world

from flex_model import FlexModel, HookFunction
from flex_model.layout.layout import Layout, ZigZag
from flex_model.routing.assembly import assemble, place_of
from flex_model.routing.copies import Copies
from flex_model.routing.memory import LARGE, Memory

SIZE = LARGE // 4  # elements in float32


def test_it_comes_back_when_the_last_view_is_gone() -> None:
    memory = Memory()
    first = memory.empty((2, SIZE // 2), torch.float32)
    where, view = first.data_ptr(), first[1].numpy()
    del first
    other = memory.empty((SIZE,), torch.float32)
    assert other.data_ptr() != where, "a view of it is still there"
    del view
    again = memory.empty((SIZE,), torch.int32)
    assert again.data_ptr() == where and again.dtype is torch.int32


def test_two_never_have_the_same() -> None:
    memory = Memory()
    held = [memory.empty((SIZE,), torch.float32).fill_(i) for i in range(4)]
    assert [t[0].item() for t in held] == [0, 1, 2, 3] and len({t.data_ptr() for t in held}) == 4


def test_what_is_kept_is_bounded_and_the_oldest_goes_first() -> None:
    memory = Memory(room=2 * LARGE)
    held = [memory.empty((SIZE,), torch.float32) for _ in range(3)]
    places = [t.data_ptr() for t in held]
    for _ in range(3):
        held.pop(0)
    assert list(memory._free) == places[1:]
    del held
    larger = memory.empty((3 * SIZE,), torch.float32)
    del larger
    assert not memory._free, "more than there is room for is not kept"


def test_small_memory_is_the_allocators() -> None:
    memory = Memory()
    small = memory.empty((SIZE - 1,), torch.float32)
    del small
    assert not memory._free


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_is_an_ordinary_tensor(mode: type) -> None:
    with mode():
        got = Memory().empty((SIZE,), torch.float32)
    assert not got.is_inference() and got.is_leaf and not got.requires_grad
    got.fill_(1).requires_grad_().sum().backward()
    assert got.grad is not None and got.grad.sum() == SIZE


def test_it_may_be_let_go_in_any_thread() -> None:
    memory, held = Memory(), []
    held.append(memory.empty((SIZE,), torch.float32))
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert len(memory._free) == 1


def test_captures_of_one_process_are_copies_also_when_memory_is_used_again() -> None:
    linear = nn.Linear(64, 64)
    output: dict[str, list[Tensor]] = {}
    fm, places = FlexModel(nn.Sequential(linear, nn.ReLU(inplace=True)), output), []
    fm.register_forward_hook(HookFunction("0"))
    inputs = [torch.full((LARGE // 256, 64), float(i)) for i in range(6)]
    with torch.no_grad():
        for start in (0, 3):
            output.clear()
            for x in inputs[start : start + 3]:
                fm(x)
            got = output["0"]
            want = [nn.functional.linear(x, linear.weight, linear.bias) for x in inputs[start : start + 3]]
            assert len(got) == 3 and all(map(torch.equal, got, want))
            places.append({t.data_ptr() for t in got})
            del got
    assert places[0] == places[1] and len(places[0]) == 3


def test_large_captures_of_what_is_compiled_with_its_hooks() -> None:
    torch.compiler.reset()
    linear, output = nn.Linear(64, 64), {}
    model = nn.Sequential(linear)
    fm, x = FlexModel(model, output), torch.randn(LARGE // 256, 64)
    fm.register_forward_hook(HookFunction("0"))
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for _ in range(3):
            output.clear()
            compiled(x)
            assert len(output["0"]) == 1 and torch.equal(output["0"][0], linear.forward(x))


def test_what_is_not_numbers_side_by_side_is_cloned_by_torch() -> None:
    copies = Copies(Memory())
    scaled = torch.quantize_per_tensor(torch.randn(SIZE * 4), 0.1, 0, torch.qint8)
    sparse = torch.eye(SIZE // 256).to_sparse()
    assert copies.take(scaled, None).is_quantized and copies.take(sparse, None).is_sparse


# -- a shard goes to its place in the full tensor ----------------------------------------------------------------
class Mine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view_as(x)


def _rows(dim: int, deliver: str, dtype: torch.dtype) -> list[str]:
    """Small and large values of several calls, changed in place after they were met."""
    import torch.distributed as dist

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model, bad = nn.Sequential(Mine(), Mine()), []
    for shape in ((2, 3, 4), (1, 3, 6), (4, 6, SIZE // 4), (1, 6, SIZE)):
        output: dict[str, list[Tensor]] = {}
        if shape[dim] % mesh.size():
            continue
        fm = FlexModel(model, output, mesh=mesh, deliver=deliver)  # type: ignore[arg-type]
        for name in ("0", "1"):
            fm.register_forward_hook(HookFunction(name, layout={"tp": Shard(dim)}))
        whole = [torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]
        for one in whole:
            mine = one.chunk(mesh.size(), dim)[mesh.get_local_rank()].clone(memory_format=torch.contiguous_format)
            with torch.no_grad():
                fm(mine)
            mine.fill_(7)
        here = deliver == "all" or dist.get_rank() == 0
        for name in ("0", "1"):
            got = output.get(name, [])
            if len(got) != (3 if here else 0):
                bad.append(f"{shape}: {len(got)} values of {name}")
            bad += [f"{shape}: {name}" for g, w in zip(got, whole, strict=False) if not torch.equal(g, w)]
        fm.restore()
    return bad


@pytest.mark.parametrize("deliver", ["main", "all"])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_parts_of_all_sizes_find_their_places(dim: int, deliver: str) -> None:
    assert run_world(2, _rows, dim, deliver, torch.float32) == [[], []]


def test_parts_of_three_in_half_precision() -> None:
    assert run_world(3, _rows, 1, "main", torch.bfloat16) == [[], [], []]


class Grid:
    """As much of a mesh as places ask for."""

    def __init__(self, *sizes: int) -> None:
        self.axes = [type("Axis", (), {"size": s})() for s in sizes]
        self.home = (0,) * len(sizes)
        self.names = tuple("abc"[: len(sizes)])
        self.size = int(torch.tensor(sizes).prod())

    def group_rank(self, at: tuple[int, ...]) -> int:
        return int(torch.arange(self.size).view([a.size for a in self.axes])[at])

    def coordinate_of(self, rank: int) -> tuple[int, ...]:
        return tuple(int(i[0]) for i in torch.where(torch.arange(self.size).view([a.size for a in self.axes]) == rank))


@pytest.mark.parametrize(
    "placements", [(Shard(0), Shard(1)), (Shard(1), Shard(1)), (Shard(2), Replicate()), (Replicate(), Shard(0))]
)
def test_places_are_where_the_parts_are_put_together(placements: tuple[Placement, ...]) -> None:
    mesh, layout = Grid(2, 3), Layout(placements, "said", ragged=(False, False))
    assert layout.has_places
    parts = {rank: torch.randn(2, 3, 4) for rank in range(6)}
    whole = assemble(parts, layout, mesh)  # type: ignore[arg-type]
    assert isinstance(whole, Tensor)
    owners = range(6) if Replicate() not in placements else (range(3) if placements[0].is_replicate() else (0, 3))
    for rank in owners:
        assert torch.equal(place_of(whole, layout, mesh, rank), parts[rank])  # type: ignore[arg-type]


@pytest.mark.parametrize("placement", [Partial(), ZigZag(1), _StridedShard(1, split_factor=2)])
def test_what_has_no_places(placement: Placement) -> None:
    assert not Layout((placement,), "said", ragged=(False,)).has_places
    assert not Layout((Shard(0),), "said", ragged=(False,), parted=(0,)).has_places
