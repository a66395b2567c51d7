"""``held``: how many parameters each rank holds, from their layouts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import ceil, prod

from flex_model.show.outline import Node, Outline

__all__ = ["Held", "held"]

_SHARD = re.compile(r"_?S\((-?\d+)")  # torch's words for Shard and for _StridedShard
Kind = tuple[tuple[int, ...], tuple[str, ...], tuple[int, ...]]  # shape, placements, stages


@dataclass(frozen=True, slots=True)
class Held:
    """By rank in the order of the mesh. ``alike``: the same number for ranks that hold the same parameters.

    ``about``: pieces of flat parameters are counted as equal ones.
    """

    counts: tuple[int, ...]
    alike: tuple[int, ...]
    about: bool


def held(outline: Outline) -> Held:
    """Elements of parameters, tied ones once."""
    kinds: Counter[Kind] = Counter()
    for node in _distinct(outline.root):
        kinds.update((p.shape, p.placements, node.row.stages) for p in node.row.parameters if not p.same_as)
    inner = [i for i, axis in enumerate(outline.axes) if axis.kind != "stage"]
    stage = next((i for i, axis in enumerate(outline.axes) if axis.kind == "stage"), None)
    split = {inner[a] for _, words, _ in kinds for a, word in enumerate(words) if word != "R" and a < len(inner)}
    known: dict[tuple[int, ...], int] = {}
    counts, alike = [], []
    for place in product(*(range(axis.size) for axis in outline.axes)):
        key = tuple(c if i in split or i == stage else 0 for i, c in enumerate(place))
        if key not in known:
            known[key] = len(known)
            here = None if stage is None else place[stage]
            counts.append(sum(n * _part(outline, kind, [place[i] for i in inner], here) for kind, n in kinds.items()))
        alike.append(known[key])
    return Held(tuple(counts[i] for i in alike), tuple(alike), any("flat" in words for _, words, _ in kinds))


def _distinct(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        if not child.row.same_as:
            yield from _distinct(child)


def _part(outline: Outline, kind: Kind, place: list[int], stage: int | None) -> int:
    """How much of a parameter is on the rank at ``place``, along all axes but the one of stages."""
    shape, placements, stages = kind
    if stage is not None and stages and stage not in {outline.places.get(s, s) for s in stages}:
        return 0
    sizes = [axis.size for axis in outline.axes if axis.kind != "stage"]
    dims, pieces = list(shape), 1
    for word, size, at in zip(placements, sizes, place, strict=False):
        shard = _SHARD.match(word)
        if word == "flat":
            pieces *= size
        elif shard:
            dim = int(shard[1])
            chunk = ceil(dims[dim] / size)
            dims[dim] = min(chunk, max(0, dims[dim] - at * chunk))
    return round(prod(dims) / pieces)
