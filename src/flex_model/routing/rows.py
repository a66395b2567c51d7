"""Rows that are tokens at experts: what identifies them, on a rank and on the way to the user.

Inside a mixture of experts a row is a pair (token, expert). Which rows a rank holds, and in which order, is the
engine's business, so that they have no rectangular whole; what they do have is the token and the expert of each. A
rank's own knowledge is in ``Gathered``. Where tokens were sent to their experts' ranks, a row's token is known only
together with what the others sent: ``encode`` packs a rank's part, ``resolve`` reads all parts together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from flex_model.layout.mesh import ModelMesh

__all__ = ["Gathered", "Origin", "RowSource", "Rows", "encode", "parted_axes", "resolve"]


@dataclass(frozen=True, eq=False)
class Rows:
    """Tokens at experts, the same on one process and on many: sorted by expert, then by token.

    ``values`` is ``(R, ...)``; ``tokens`` and ``experts``, both ``(R,)``, say of each row which token of the whole
    batch it is (counted through the batch in its order, ``b * S + s``) and which expert it is at.

    >>> rows = Rows.sorted(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([1, 0, 1]), torch.tensor([5, 5, 0]))
    >>> rows.values.flatten().tolist(), rows.tokens.tolist(), rows.experts.tolist()
    ([3.0, 2.0, 1.0], [1, 0, 1], [0, 5, 5])
    >>> torch.zeros(2, 1).index_add(0, rows.tokens, rows.values).flatten().tolist()  # summed over a token's experts
    [2.0, 4.0]
    """

    values: Tensor
    tokens: Tensor
    experts: Tensor

    @classmethod
    def sorted(cls, values: Tensor, tokens: Tensor, experts: Tensor) -> Rows:
        by_token = torch.argsort(tokens, stable=True)
        order = by_token[torch.argsort(experts[by_token], stable=True)]
        return cls(values[order.to(values.device)], tokens[order], experts[order])

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False, slots=True)
class Origin:
    """One forward of a mixture of experts on this rank.

    ``tokens`` is how many its batch has. Where they were sent to other ranks: ``sent`` are the tokens of the pairs in
    the order of sending, ``sizes`` how many went to each of ``peers`` (global ranks).
    """

    serial: int
    tokens: int
    sent: Tensor | None = None
    sizes: tuple[int, ...] = ()
    peers: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False, slots=True)
class Gathered:
    """Rows that this rank's experts are run on at once.

    ``tokens``: the token in this rank's batch, or, where the origin was sent rows, the place among those received.
    ``kept``: which of the rows that modules see are meant; the others are an engine's own filling. None: all.
    ``ordered``: they follow the order of the batch, so that the ranks' rows make a whole.
    """

    origin: Origin
    index: int  # of those of its origin
    total: int  # rows that modules see
    tokens: Tensor
    experts: Tensor
    kept: Tensor | None = None
    ordered: bool = False

    def take(self, value: Tensor) -> Tensor:
        """The rows that are meant."""
        return value if self.kept is None else value[self.kept]

    def put(self, value: Tensor, rows: Tensor) -> Tensor:
        """``value`` with those rows replaced, differentiably."""
        return rows if self.kept is None else value.index_put((self.kept,), rows)


class RowSource(Protocol):
    """What an engine knows of the rows inside one mixture of experts."""

    spread: tuple[int, ...]  # the global ranks that its experts are spread over

    def holds(self, module: torch.nn.Module) -> bool:
        """Whether ``module`` is inside, where rows are tokens at experts."""

    def watch(self) -> Sequence[Any]:
        """Begin to look on; handles whose ``remove()`` ends it."""

    def rows(self, value: Tensor) -> Gathered | None:
        """What the rows of a value inside are right now; None where this engine cannot tell."""


def parted_axes(mesh: ModelMesh, source: RowSource) -> tuple[int, ...]:
    """The axes along which ranks hold rows of their own: those of the batch, and those experts are spread over."""
    spread = set(source.spread)
    return tuple(i for i, a in enumerate(mesh.axes) if a.kind == "data" or spread.issuperset(a.ranks))


def encode(pieces: Sequence[Gathered], device: torch.device) -> Tensor:
    """All that this rank knows of its rows, as one line of integers."""
    if not pieces:
        return torch.empty(0, dtype=torch.long, device=device)
    origin = pieces[0].origin
    head = torch.tensor([origin.tokens, len(origin.peers), *origin.peers, *origin.sizes], device=device)
    sent = head[:0] if origin.sent is None else origin.sent
    tokens, experts = torch.cat([p.tokens for p in pieces]), torch.cat([p.experts for p in pieces])
    return torch.cat([head, sent.to(device), tokens.to(device), experts.to(device)])


@dataclass(frozen=True, slots=True)
class _Known:
    """``encode`` undone; a rank that had no rows knows nothing."""

    count: int
    sent: Mapping[int, Tensor]  # by receiving rank
    peers: tuple[int, ...]
    tokens: Tensor
    experts: Tensor


def _decode(line: Tensor) -> _Known:
    line = line.cpu()
    if not line.numel():
        return _Known(0, {}, (), line, line)
    count, n = line[:2].tolist()
    peers, sizes, rest = tuple(line[2 : 2 + n].tolist()), line[2 + n : 2 + 2 * n].tolist(), line[2 + 2 * n :]
    sent, rest = rest[: sum(sizes)], rest[sum(sizes) :]
    half = len(rest) // 2
    return _Known(count, dict(zip(peers, sent.split(sizes), strict=True)), peers, rest[:half], rest[half:])


def resolve(lines: Sequence[Tensor], coordinates: Sequence[Mapping[str, int]], mesh: ModelMesh) -> list[Ids]:
    """(token of the whole batch, expert) of the rows of each part, from what all parts know together."""
    known = [_decode(line) for line in lines]
    data = [a.name for a in mesh.axes if a.kind == "data"]
    batch = [tuple(c[n] for n in data if n in c) for c in coordinates]
    counts = {b: max(k.count for k, other in zip(known, batch, strict=True) if other == b) for b in sorted(set(batch))}
    first = dict(zip(counts, accumulate(counts.values(), initial=0), strict=False))
    at = {
        rank: i
        for rank, place in zip(mesh.ranks, map(mesh.coordinate_of, range(mesh.size)), strict=True)
        for i, c in enumerate(coordinates)
        if all(dict(zip(mesh.names, place, strict=True))[n] == at for n, at in c.items())
    }
    rank_of = {i: rank for rank, i in at.items()}

    def whole(i: int) -> Ids:
        one = known[i]
        if not one.peers:
            return one.tokens + first[batch[i]], one.experts
        arrived = [known[at[p]].sent[rank_of[i]] + first[batch[at[p]]] for p in one.peers]
        return torch.cat(arrived)[one.tokens], one.experts

    return [whole(i) for i in range(len(known))]


Ids = tuple[Tensor, Tensor]
