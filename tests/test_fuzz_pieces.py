"""Random inputs to the parts that need no ranks: trees, globs, selections, putting parts together, orders of shards."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from typing import Any

import fuzz
import fuzz_edits
import fuzz_models
import torch
from fuzz_case import choose
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_order import Noted
from torch import Tensor
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from flex_model import ZigZag
from flex_model.core.naming.globs import glob_to_regex
from flex_model.layout.layout import Layout, merge_parts, my_part, shard_dim
from flex_model.layout.moves import out_of_order
from flex_model.routing.assembly import assemble, part_of
from flex_model.routing.selection import Selection
from flex_model.trees import find_leaves, replace_leaves, resolve_index

CASES = int(os.environ.get("FLEX_MODEL_FUZZ_CASES", "2000"))
each = settings(
    max_examples=max(1, CASES // 4),
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


# -- trees -----------------------------------------------------------------------------------------------------
@st.composite
def trees(draw: st.DrawFn) -> Any:
    return fuzz_models.pack(fuzz._spec(draw, tuple(fuzz_models.KINDS), 3), torch.randn(2, 3, 4))


@each
@given(trees())
def test_tensors_are_found_in_order(value: Any) -> None:
    found, want = find_leaves(value), fuzz_models.leaves(value)
    assert [x.path for x in found] == [path for path, _ in want]
    assert all(x.tensor is t and x.index == i for i, (x, (_, t)) in enumerate(zip(found, want, strict=True)))


@each
@given(trees(), st.data())
def test_tensors_are_replaced_and_nothing_else(value: Any, data: st.DataObject) -> None:
    before = fuzz_models.leaves(value)
    which = data.draw(st.sets(st.sampled_from(range(len(before)))) if before else st.just(set()))
    new = {i: torch.zeros(i + 1) for i in which}
    out = replace_leaves(value, new)
    assert type(out) is type(value) and (out is value or new)
    want = [new.get(i, t) for i, (_, t) in enumerate(before)]
    assert all(a is b for (_, a), b in zip(fuzz_models.leaves(out), want, strict=True))
    assert [t for _, t in fuzz_models.leaves(value)] == [t for _, t in before] or not before
    mended = replace_leaves(out, {i: t for i, (_, t) in enumerate(before)})
    assert repr(mended) == repr(value)


@each
@given(trees(), st.data())
def test_places_are_named(value: Any, data: st.DataObject) -> None:
    leaves = find_leaves(value)
    paths = [x.path for x in leaves if x.path]
    some = st.integers(-4, 4) | st.sampled_from([*paths, *(p.rpartition(".")[0] for p in paths if "." in p), "none"])
    idx = data.draw(some | st.just("all") | st.lists(some, max_size=3).map(tuple))
    assert [x.index for x in resolve_index(leaves, idx)] == choose([(x.path, x.tensor) for x in leaves], idx)


# -- globs -----------------------------------------------------------------------------------------------------
def matches(pattern: str, name: str) -> bool:
    """The meaning of a glob, one sign at a time."""
    if not pattern:
        return not name
    if pattern.startswith("**"):
        return any(matches(pattern[2:], name[i:]) for i in range(len(name) + 1))
    if pattern[0] == "*":
        return any(matches(pattern[1:], name[i:]) for i in range(len(name) + 1) if "." not in name[:i])
    if not name:
        return False
    if pattern[0] == "[" and "]" in pattern[2:]:
        end = pattern.index("]", 2)
        inside = pattern[1:end]
        negated, inside = inside.startswith("!"), inside.removeprefix("!")
        return ((name[0] in inside) != negated) and matches(pattern[end + 1 :], name[1:])
    return ((pattern[0] == "?" and name[0] != ".") or pattern[0] == name[0]) and matches(pattern[1:], name[1:])


names = st.lists(st.text("ab01_", min_size=1, max_size=3), min_size=1, max_size=3).map(".".join)
globs = st.lists(st.sampled_from(["a", "b", "0", ".", "*", "**", "?", "[01]", "[!a]", "[!.]", "_", "a.", "*."])).map(
    "".join
)


@each
@given(globs, names)
def test_globs(pattern: str, name: str) -> None:
    while "***" in pattern:
        pattern = pattern.replace("***", "**")
    assert bool(glob_to_regex(pattern).fullmatch(name)) == matches(pattern, name)


# -- selections ------------------------------------------------------------------------------------------------
@st.composite
def shapes(draw: st.DrawFn, dims: int = 4) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=dims)))


def numbered(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(prod(shape), dtype=torch.float64).view(shape)


@each
@given(shapes(), st.data())
def test_parts_are_put_back(shape: tuple[int, ...], data: st.DataObject) -> None:
    select = data.draw(fuzz.selects(shape))
    if not fuzz_edits.can_write(select, shape):
        return
    value, selection = numbered(shape), Selection(fuzz_edits.selection(select))
    part = selection.take(value)
    assert torch.equal(part, fuzz_edits.take(select, value))
    new = -part - 1
    given = value.clone()
    assert torch.equal(selection.put(value, new), fuzz_edits.put(select, value, new))
    assert torch.equal(value, given)


@each
@given(shapes(), st.data())
def test_selections_are_the_same_on_shards(shape: tuple[int, ...], data: st.DataObject) -> None:
    """What every rank takes from its own shard, put together, is what is taken from the whole."""
    select, dim = data.draw(fuzz.selects(shape)), data.draw(st.integers(0, len(shape) - 1))
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=3))
    shape = (*shape[:dim], sum(sizes), *shape[dim + 1 :])
    ragged = data.draw(st.booleans()) or len(set(sizes)) > 1
    value, selection = numbered(shape), Selection(fuzz_edits.selection(select))
    layout = Layout((Shard(dim),), "test", shape, (ragged,))
    parts = value.split(sizes, dim)
    found = [selection.on_shards(layout, tuple(p.shape), {0: len(sizes)}) for p in parts]
    if None in found:
        assert not any(found)  # ranks agree without asking
        return
    placements = {f.placements for f in found if f is not None}
    assert len(placements) == 1
    taken = merge_parts([selection.take(p) for p in parts], placements.pop()[0])
    assert torch.equal(taken, selection.take(value))


# -- parts and wholes ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Line:
    """What assembly asks of an axis."""

    size: int


@dataclass(frozen=True)
class Grid:
    """What assembly asks of a mesh."""

    sizes: tuple[int, ...]

    @property
    def axes(self) -> list[Line]:
        return [Line(s) for s in self.sizes]

    @property
    def names(self) -> list[str]:
        return [f"axis{i}" for i in range(len(self.sizes))]

    @property
    def home(self) -> tuple[int, ...]:
        return (0,) * len(self.sizes)

    def group_rank(self, coordinate: tuple[int, ...]) -> int:
        rank = 0
        for place, size in zip(coordinate, self.sizes, strict=True):
            rank = rank * size + place
        return rank

    def coordinate_of(self, rank: int) -> tuple[int, ...]:
        places = []
        for size in reversed(self.sizes):
            rank, place = divmod(rank, size)
            places.append(place)
        return tuple(reversed(places))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Grid, tuple[Placement, ...], list[Tensor], Tensor]:
    """(mesh, placements, every rank's part by group rank, the whole)."""
    grid = Grid(tuple(draw(st.lists(st.integers(2, 3), min_size=1, max_size=2))))
    kinds = st.sampled_from(["shard", "shard", "replicate", "partial", "strided", "zigzag"])
    dims, placements = list(range(3)), []
    for _ in grid.sizes:
        kind, dim = draw(kinds), draw(st.sampled_from(dims))
        if kind in ("strided", "zigzag"):
            dims.remove(dim)  # alone on their dim
        placements.append(
            {
                "shard": Shard(dim),
                "replicate": Replicate(),
                "partial": Partial("sum"),
                "strided": _StridedShard(dim, split_factor=2),
                "zigzag": ZigZag(dim),
            }[kind]
        )
    taken = [shard_dim(p) for p in placements if not isinstance(p, Shard)]
    placements = [Replicate() if isinstance(p, Shard) and p.dim in taken else p for p in placements]
    whole = numbered(tuple(12 if d in map(shard_dim, placements) else draw(st.integers(1, 2)) for d in range(3)))
    parts = {(): whole}
    for axis, size in enumerate(grid.sizes):  # the outer axis first, as ranks are counted
        placement, new = placements[axis], {}
        for prefix, tensor in parts.items():
            dim, sizes = shard_dim(placement), [1] * size
            if dim is not None:
                sizes = [tensor.shape[dim] // size] * size
                if isinstance(placement, Shard):
                    sizes = _cut(draw, tensor.shape[dim], size)
            new.update({(*prefix, i): my_part(tensor, placement, sizes, i) for i in range(size)})
        parts = new
    return grid, tuple(placements), [parts[grid.coordinate_of(r)] for r in range(prod(grid.sizes))], whole


def _cut(draw: st.DrawFn, total: int, count: int) -> list[int]:
    ends = sorted(draw(st.integers(0, total)) for _ in range(count - 1))
    return [b - a for a, b in zip([0, *ends], [*ends, total], strict=True)]


@each
@given(layouts())
def test_parts_make_the_whole_and_the_whole_makes_the_parts(
    drawn: tuple[Grid, tuple[Placement, ...], list[Tensor], Tensor],
) -> None:
    grid, placements, parts, whole = drawn
    layout = Layout(placements, "test", tuple(whole.shape), tuple(True for _ in placements))
    built = assemble(dict(enumerate(parts)), layout, grid)  # type: ignore[arg-type]
    assert isinstance(built, Tensor)
    assert torch.allclose(built, whole)
    shapes_ = [tuple(p.shape) for p in parts]
    for rank, part in enumerate(parts):
        assert torch.allclose(part_of(whole, layout, grid, shapes_, rank), part)  # type: ignore[arg-type]


# -- orders of shards ------------------------------------------------------------------------------------------
Move = tuple[str, Any]
HEADS, HEAD = 4, 2


@st.composite
def programs(draw: st.DrawFn) -> list[Move]:
    moves: list[Move] = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["transpose", "merge", "split", "unary", "double", "cat", "repeat", "sum", "flip"]))
        moves.append((kind, (draw(st.integers(0, 3)), draw(st.integers(0, 3)))))
    return moves


def play(x: Tensor, moves: list[Move], heads: int) -> Tensor:
    """A model's views, with the number of heads that a rank has."""
    x = x.view(2, 3, heads, HEAD)
    for kind, (a, b) in moves:
        a, b = a % x.dim(), b % x.dim()
        if kind == "transpose":
            x = x.transpose(a, b)
        elif kind == "merge" and x.dim() > 1:
            a = min(a, x.dim() - 2)
            x = x.reshape(*x.shape[:a], -1, *x.shape[a + 2 :])
        elif kind == "split" and x.shape[a] % 2 == 0:
            x = x.reshape(*x.shape[:a], 2, -1, *x.shape[a + 1 :]) if b % 2 else x.unflatten(a, (-1, 2))
        elif kind == "unary":
            x = x * 2 + 1
        elif kind == "double":
            x = x + x
        elif kind == "cat":
            x = torch.cat([x, -x], a)
        elif kind == "repeat":
            x = x.repeat(*(2 if d == a else 1 for d in range(x.dim())))
        elif kind == "sum" and x.dim() > 2:
            x = x.sum(a)
        elif kind == "flip":
            x = x.transpose(a, b) * 1.0
    return x.clone()


@each
@given(programs())
def test_an_order_that_is_not_doubted_is_right(moves: list[Move]) -> None:
    """Two ranks have half the heads each: where sizes fit and nothing is said, their results make up the whole one."""
    whole = numbered((2, 3, HEADS * HEAD))
    halves = whole.chunk(2, -1)
    try:
        results, traces = [], []
        for x, heads in ((halves[0], HEADS // 2), (halves[1], HEADS // 2), (whole, HEADS)):
            with Noted() as mode:
                results.append(play(x.clone(), moves, heads))
            traces.append(mode.trace)
        number = traces[2].number(results[2])
        doubts = out_of_order(traces[0], traces[2])
    except (RuntimeError, ValueError):
        return  # the code does something else with fewer heads, or cannot run
    small, large = results[0].shape, results[2].shape
    grown = [d for d in range(len(large)) if small[d] != large[d]]
    if len(small) != len(large) or len(grown) != 1 or number in doubts:
        return
    assert torch.equal(torch.cat(results[:2], grown[0]), results[2])
