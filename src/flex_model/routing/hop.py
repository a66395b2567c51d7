"""From stage to stage: full values of a pipeline's stages to the ranks of the others.

Each stage has delivered what it captured to its own ranks; here every line of ranks along the stage axis passes it
on. A line tells what it has in one small exchange, and its shapes in a larger one where that is new.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flex_model.layout.mesh import ModelMesh
from flex_model.routing.collectives import all_gather_ints, all_gather_objects, from_bytes, to_bytes
from flex_model.trees import replace_leaves, tensors

__all__ = ["Hop", "Parcel"]

_BUCKET = 64 * 2**20  # bytes that travel in one message


@dataclass(slots=True)
class Parcel:
    """A value of one stage. ``label`` says to every rank what it is; ``value`` may be any tree, or an exception."""

    label: tuple[Any, ...]
    mode: str  # "main" | "all"
    value: Any


@dataclass(frozen=True, slots=True)
class _Bill:
    """What a stage's rank announces of a parcel: all but the bytes."""

    label: tuple[Any, ...]
    mode: str
    frame: Any  # the value with empty tensors in it; None for a tensor alone
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @property
    def sizes(self) -> list[int]:
        return [int(torch.Size(s).numel()) * d.itemsize for s, d in zip(self.shapes, self.dtypes, strict=True)]


class Hop:
    """The exchange along the stage axis of one mesh. Manifests that were seen before are not sent again."""

    def __init__(self, mesh: ModelMesh) -> None:
        self.mesh = mesh
        self._seen: dict[tuple[int, ...], list[list[_Bill]]] = {}

    @property
    def _group(self) -> dist.ProcessGroup:
        axis = self.mesh.stage_axis
        assert axis is not None
        return self.mesh.group(axis)

    def exchange(
        self, mine: Sequence[Parcel], device: torch.device, put: Callable[[tuple[Any, ...], Any], None]
    ) -> None:
        """``put(label, value)`` of every stage's parcels, stage after stage, where they go to. Collective."""
        axis = self.mesh.stage_axis
        assert axis is not None
        line = self.mesh.axes[axis].ranks
        home = line.index(self.mesh.main) if self.mesh.main in line else None  # main's place on this line
        mine = [p for p in mine if p.mode == "all" or home is not None]
        bills = self._bills([_bill(p) for p in mine])
        here = self.mesh.stage
        for source, theirs in enumerate(bills):
            own = list(mine) if source == here else []
            for mode in ("all", "main"):
                chosen = [i for i, b in enumerate(theirs) if b.mode == mode]
                target = None if mode == "all" else home
                data = self._move(
                    [t for i in chosen for t in tensors(own[i].value)] if own else None,
                    [s for i in chosen for s in theirs[i].sizes],
                    source,
                    target,
                    device,
                )
                if not own and target in (None, here):
                    own_values = _built([theirs[i] for i in chosen], data)
                    for i, value in zip(chosen, own_values, strict=True):
                        put(theirs[i].label, value)
                elif own and target in (None, here):
                    for i in chosen:
                        put(own[i].label, own[i].value)

    def _bills(self, mine: list[_Bill]) -> list[list[_Bill]]:
        mark = int.from_bytes(hashlib.blake2b(pickle.dumps(mine), digest_size=7).digest(), "big")
        marks = tuple(row[0] for row in all_gather_ints([mark], self._group))
        if marks not in self._seen:
            if len(self._seen) > 64:
                self._seen.clear()
            self._seen[marks] = all_gather_objects(mine, self._group)
        return self._seen[marks]

    def _move(
        self, mine: list[Tensor] | None, sizes: Sequence[int], source: int, target: int | None, device: torch.device
    ) -> list[Tensor]:
        """Each tensor's bytes, on the ranks they are for: all of the line (``target`` None) or one."""
        out: list[Tensor] = []
        here = self.mesh.stage
        if target == source or (target is not None and here not in (source, target)):
            return out
        for start, stop in _buckets(sizes):
            total = sum(sizes[start:stop])
            if mine is not None:
                flat = torch.cat([to_bytes(t) for t in mine[start:stop]]) if total else torch.empty(0)
            else:
                flat = torch.empty(total, dtype=torch.uint8, device=device)
            if total and target is None:
                dist.broadcast(flat, group=self._group, group_src=source)
            elif total and mine is not None:
                dist.send(flat, group=self._group, group_dst=target)
            elif total:
                dist.recv(flat, group=self._group, group_src=source)
            if mine is None:
                out += flat.split(list(sizes[start:stop]))
        return out


def _bill(parcel: Parcel) -> _Bill:
    if isinstance(parcel.value, Exception):
        return _Bill(parcel.label, parcel.mode, parcel.value, (), ())
    if isinstance(parcel.value, Tensor):
        return _Bill(parcel.label, parcel.mode, None, (tuple(parcel.value.shape),), (parcel.value.dtype,))
    found = tensors(parcel.value)
    frame = replace_leaves(parcel.value, {i: torch.empty(0) for i in range(len(found))})
    return _Bill(parcel.label, parcel.mode, frame, tuple(tuple(t.shape) for t in found), tuple(t.dtype for t in found))


def _built(bills: Sequence[_Bill], data: Sequence[Tensor]) -> list[Any]:
    values, rest = [], iter(data)
    for bill in bills:
        parts = [
            from_bytes(next(rest), shape, dtype).clone() for shape, dtype in zip(bill.shapes, bill.dtypes, strict=True)
        ]
        alone = bill.frame is None and len(parts) == 1
        values.append(parts[0] if alone else replace_leaves(bill.frame, dict(enumerate(parts))))
    return values


def _buckets(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Where to cut a list of sizes so that each part is at most a bucket, or one value."""
    cuts, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        if total and total + size > _BUCKET:
            cuts.append((start, i))
            start, total = i, 0
        total += size
    return [*cuts, (start, len(sizes))] if len(sizes) > start else cuts
