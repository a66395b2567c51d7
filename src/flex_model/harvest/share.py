"""``Share``: the rows and columns of one site that this rank writes, straight from the shard that it holds.

Every number of a site is written by exactly one rank. Ranks that hold parts write their own; of ranks that hold the
same, one writes, for each site another, or each some of the columns where sites are few. Only sums that are still to
be made (``Partial``) move: each rank receives the sum of its columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from flex_model.errors import HarvestError
from flex_model.layout.layout import Layout, ZigZag, my_part, on_dim, shard_dim
from flex_model.layout.mesh import ModelMesh
from flex_model.routing.selection import Selection

__all__ = ["Grid", "Met", "Share", "Way", "cuts"]

Way = tuple[tuple[int, bool], ...]  # of each axis that shares a sequence: its ranks, and whether in zig-zag


@dataclass(frozen=True, slots=True)
class Grid:
    """What a batch's rows are: tokens ``(samples, length)``, or with ``length=None`` its samples."""

    samples: int  # of this rank
    length: int | None

    def __str__(self) -> str:
        return f"({self.samples}, {self.length})" if self.length is not None else f"({self.samples},)"


@dataclass(frozen=True, slots=True)
class Met:
    """What a rank tells the others of a value that it met in the first step."""

    shape: tuple[int, ...]
    dtype: str
    layout: Layout


class Share:
    """``met``: by rank of the mesh. ``second``: the batch is dim 1 where both ways fit, as in Megatron's layers.

    ``row_shape``: of one whole row; ``columns``: (columns of the shard's rows, the first one's place in the whole row).
    """

    def __init__(
        self,
        where: str,
        met: Sequence[Met],
        grid: Grid,
        mesh: ModelMesh,
        *,
        number: int,
        sites: int,
        second: bool,
        selection: Selection | None,
        sample: Tensor,
    ) -> None:
        self.where, self.mesh = where, mesh
        mine = met[mesh.me]
        self.placements = list(mine.layout.placements)
        self.dims = self._token_dims(mine.shape, grid, second)
        shapes = [list(m.shape) for m in met]
        self._sums = {i: p for i, p in enumerate(self.placements) if isinstance(p, Partial)}
        for axis in self._sums:
            self._scatter(axis, shapes)
        self._features = [d for d in range(len(mine.shape)) if d not in self.dims]
        self._select: Callable[[Tensor], Tensor] | None = None
        sizes = tuple(self._whole_size(d, shapes) for d in self._features)
        numbers = torch.arange(prod(sizes)).view(sizes)
        wanted = numbers if selection is None else self._wanted(selection, numbers, sample)
        self.row_shape = tuple(wanted.shape) or (1,)
        held = wanted.flatten() if self._select is not None else self._held(numbers, shapes)
        self.columns = self._columns(wanted.flatten(), held, number, sites)

    # -- rows --------------------------------------------------------------------------------------------------
    def _token_dims(self, shape: Sequence[int], grid: Grid, second: bool) -> tuple[int, ...]:
        """The dims that count samples and positions, in this order; one dim where they are one."""
        if grid.length is None:
            if shape and shape[0] == grid.samples and self._axes_on(0, "tensor") == []:
                return (0,)
        elif len(shape) > 1:
            for dims in ((1, 0), (0, 1)) if second else ((0, 1), (1, 0)):
                if self._holds(shape, grid, dims):
                    return dims
        rows = 0 if grid.length is None else grid.samples * grid.length
        if shape and shape[0] == rows and not self._axes_on(0, "tensor") and not self._axes_on(0, "sequence"):
            return (0,)
        kind = "samples" if grid.length is None else "tokens"
        raise HarvestError(
            f"{self.where}: its shard is {tuple(shape)} with {self.placements}, which has no rows for the batch's "
            f"{grid} {kind} on rank {self.mesh.rank}; take a site with a row for each, or change it with select=.",
            page="harvest-rows",
        )

    def _holds(self, shape: Sequence[int], grid: Grid, dims: tuple[int, int]) -> bool:
        samples, length = dims
        if shape[samples] != grid.samples or self._axes_on(samples, "tensor") or self._axes_on(samples, "sequence"):
            return False
        data = [i for i, a in enumerate(self.mesh.axes) if a.kind == "data" and not a.sequence]
        return self._axes_on(samples, "data") == data and shape[length] == len(
            held(grid.length or 0, self._way(length), self._places(length))
        )

    def _axes_on(self, dim: int, kind: str) -> list[int]:
        """The axes of a kind that shard a dim."""
        kinds = ["sequence" if a.sequence else a.kind for a in self.mesh.axes]
        return [i for i, p in enumerate(self.placements) if shard_dim(p) == dim and kinds[i] == kind]

    @property
    def way(self) -> Way:
        """How the sequence is shared among ranks."""
        return self._way(self.dims[1]) if len(self.dims) > 1 else ()

    def _way(self, dim: int) -> Way:
        return tuple((self.mesh.axes[a].size, isinstance(self.placements[a], ZigZag)) for a in self._along(dim))

    def positions(self, length: int | None) -> Tensor | None:
        """Those of the sequence that this rank holds, in rising order; None: all."""
        return held(length, self.way, self._places(self.dims[1])) if length is not None and self.way else None

    def _places(self, dim: int) -> list[int]:
        return [self.mesh.coordinate[axis] for axis in self._along(dim)]

    def _along(self, dim: int) -> list[int]:
        """The axes that share the sequence among ranks."""
        return [i for i, p in enumerate(self.placements) if shard_dim(p) == dim]

    # -- columns -----------------------------------------------------------------------------------------------
    def _scatter(self, axis: int, shapes: list[list[int]]) -> None:
        """The placements and shapes as they are once this axis's sums are made."""
        last = len(shapes[0]) - 1
        if last in self.dims or any(shard_dim(p) == last for p in self.placements):
            raise HarvestError(
                f"{self.where}: ranks along {self.mesh.names[axis]!r} hold summands, with no dim to share the sums "
                f"by; take the value behind the sum, such as what the layer puts out.",
                page="harvest-rows",
            )
        self.placements[axis] = Shard(last)
        for rank, shape in enumerate(shapes):
            shape[last] = sizes_of(shape[last], self.mesh.axes[axis].size)[self.mesh.coordinate_of(rank)[axis]]

    def _whole_size(self, dim: int, shapes: Sequence[Sequence[int]]) -> int:
        """Of a dim: over the ranks along the axes that shard it."""
        axes = [i for i, p in enumerate(self.placements) if shard_dim(p) == dim]
        others = [i for i in range(len(self.placements)) if i not in axes]

        def elsewhere(rank: int) -> tuple[int, ...]:
            coordinate = self.mesh.coordinate_of(rank)
            return tuple(coordinate[i] for i in others)

        here = elsewhere(self.mesh.me)
        return sum(shape[dim] for rank, shape in enumerate(shapes) if elsewhere(rank) == here)

    def _wanted(self, selection: Selection, numbers: Tensor, sample: Tensor) -> Tensor:
        """Which columns of the whole row a selection takes, found by selecting from their numbers. A function of values
        can be made where rows are whole on every rank."""
        tokens = (2, 3)[: len(self.dims)]
        given = numbers.expand(*tokens, *numbers.shape).movedim(tuple(range(len(tokens))), self.dims)
        try:
            out, renamed = selection.take(given), selection.take(7 * given + 3)
            chooses = out.dtype is torch.long and torch.equal(renamed, 7 * out + 3)  # and does not count with them
        except (RuntimeError, TypeError, IndexError, ValueError):
            chooses = False
        if chooses and out.dim() >= len(tokens):
            front = out.movedim(self.dims, tuple(range(len(tokens))))
            first = front[(0,) * len(tokens)]
            if tuple(front.shape[: len(tokens)]) == tokens and bool((front == first).all()):
                return first
        whole = all(isinstance(p, Replicate) or shard_dim(p) in self.dims for p in self.placements)
        made = selection.take(sample) if whole else sample
        kept = [made.shape[d] == sample.shape[d] for d in self.dims] if made.dim() >= len(self.dims) else [False]
        if not whole or not all(kept):
            raise HarvestError(
                f"{self.where}: select= must leave a row for every token, and take columns by their places where ranks "
                f"hold parts of a row ({self.placements}); choose tokens with positions=, and columns with an index.",
                page="harvest-rows",
            )
        self._select = selection.take
        shape = [size for d, size in enumerate(made.shape) if d not in self.dims]
        return torch.arange(prod(shape)).view(shape)

    def _held(self, numbers: Tensor, shapes: Sequence[Sequence[int]]) -> Tensor:
        """The columns of the whole row that this rank's shard has, in its own order."""
        for axis, placement in enumerate(self.placements):
            if shard_dim(placement) in self._features:
                numbers = self._my_columns(numbers, axis, shapes)
        flat = numbers.reshape(-1)
        here = prod(shapes[self.mesh.me][d] for d in self._features)
        if len(flat) != here:
            raise HarvestError(
                f"{self.where}: rank {self.mesh.rank} holds {here} columns, and by its layout {self.placements} should "
                f"hold {len(flat)}; harvest what the module puts out, whose layout is known.",
                page="harvest-rows",
            )
        return flat

    def _columns(self, wanted: Tensor, held: Tensor, number: int, sites: int) -> list[tuple[slice, int]]:
        """Those that this rank writes: places in its shard's rows, and the first one's place in the whole row."""
        place = torch.full((int(max(wanted.max(), held.max())) + 1,), -1)
        place[held] = torch.arange(len(held))
        mine = place[wanted]
        there = (mine >= 0).nonzero().flatten()
        replicas, own = 1, 0
        for axis, placement in enumerate(self.placements):
            if isinstance(placement, Replicate):
                replicas = replicas * self.mesh.axes[axis].size
                own = own * self.mesh.axes[axis].size + self.mesh.coordinate[axis]
        self._width = len(held)
        return _runs(mine[there], there, _spread(len(there), replicas, own, number=number, sites=sites))

    def _my_columns(self, numbers: Tensor, axis: int, shapes: Sequence[Sequence[int]]) -> Tensor:
        placement = self.placements[axis]
        dim = shard_dim(placement)
        assert dim is not None
        inside, size = self._features.index(dim), self.mesh.axes[axis].size
        if sum(shard_dim(p) == dim for p in self.placements) > 1:
            sizes = sizes_of(numbers.shape[inside], size)
        else:
            sizes = [shapes[rank][dim] for rank in self.mesh.line(axis)]
        return my_part(numbers, on_dim(placement, inside), sizes, self.mesh.coordinate[axis])

    # -- a value -----------------------------------------------------------------------------------------------
    def rows(self, local: Tensor) -> list[Tensor]:
        """All rows of this rank's shard, ``(rows, columns)``, for each of ``columns``; in the shard's own memory where
        that can be."""
        for axis in self._sums:
            local = self._sum(local, axis)
        if not self.columns:
            return []
        if self._select is not None:
            local = self._select(local)
        front = local.movedim(self.dims, tuple(range(len(self.dims)))) if len(self.dims) > 1 else local
        flat = front.reshape(prod(front.shape[: len(self.dims)]), -1)
        if flat.shape[1] != self._width:
            raise HarvestError(
                f"{self.where}: its rows have {flat.shape[1]} numbers on rank {self.mesh.rank}, and had {self._width} "
                f"in the first step; harvest sites whose rows are of one size.",
                page="harvest-rows",
            )
        return [flat[:, columns] for columns, _ in self.columns]

    def _sum(self, local: Tensor, axis: int) -> Tensor:
        mesh, last = self.mesh.axis_mesh(axis, local.device.type), local.dim() - 1
        summands = DTensor.from_local(local, mesh, [self._sums[axis]], run_check=False)
        return summands.redistribute(mesh, [Shard(last)]).to_local()


def held(length: int, way: Way, places: Sequence[int]) -> Tensor:
    """The positions of a sequence that the rank at these places holds.

    >>> held(8, ((2, True),), [0]).tolist(), held(5, ((2, False),), [1]).tolist()
    ([0, 1, 6, 7], [3, 4])
    """
    found = torch.arange(length)
    for (ranks, zigzag), place in zip(way, places, strict=True):
        if zigzag and len(found) % (2 * ranks):
            return found[:0]
        found = my_part(found, ZigZag(0) if zigzag else Shard(0), sizes_of(len(found), ranks), place)
    return found


@lru_cache(maxsize=256)  # batches have few lengths
def cuts(length: int, ways: frozenset[Way]) -> list[int]:
    """Where the sequence is cut between any ranks, from 0 to ``length``.

    >>> cuts(8, frozenset([((2, False),), ((2, True),)]))
    [0, 2, 4, 6, 8]
    """
    found = {0, length}
    for way in ways:
        for places in product(*(range(ranks) for ranks, _ in way)):
            mine = held(length, way, places).tolist()
            found |= {p for i, p in enumerate(mine) if not i or mine[i - 1] != p - 1}
            found |= {p + 1 for i, p in enumerate(mine) if i + 1 == len(mine) or mine[i + 1] != p + 1}
    return sorted(found)


def sizes_of(size: int, ranks: int) -> list[int]:
    """How a dim is shared among ranks: as torch's ``chunk`` does, which ends with smaller or empty parts."""
    chunk = -(-size // ranks) if size else 0
    return [max(0, min(chunk, size - chunk * rank)) for rank in range(ranks)]


def _spread(width: int, replicas: int, mine: int, *, number: int, sites: int) -> range:
    """The columns, of those that several ranks hold alike, that this one writes."""
    if sites >= replicas:
        return range(width) if number % replicas == mine else range(0)
    sizes = sizes_of(width, replicas)
    return range(sum(sizes[:mine]), sum(sizes[: mine + 1]))


def _runs(inside: Tensor, whole: Tensor, own: range) -> list[tuple[slice, int]]:
    """Columns that follow one another both in the shard and in the whole."""
    found: list[tuple[slice, int]] = []
    places, numbers, start = inside.tolist(), whole.tolist(), own.start
    for i in own:
        last = i + 1 == own.stop
        if last or places[i + 1] != places[i] + 1 or numbers[i + 1] != numbers[i] + 1:
            found.append((slice(places[start], places[i] + 1), numbers[start]))
            start = i + 1
    return found
