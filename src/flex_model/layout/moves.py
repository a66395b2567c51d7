"""Whether operations keep shards in the order of the ranks: a size can be right where the order is not.

A dim that is sharded stays so through ``view`` only if what lies before it stays as it is: (B, S, [H]) may become
(B, S, [heads], head), not (B, S, heads, [head]). So the model's code is run on local sizes, too, and followed operation
by operation beside the twin. Of each tensor that is larger there it is known of how many blocks its sharded dim
consists, each spread over all ranks: 1 is in order, and anything else is not, until another view puts it right.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cache, lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Trace", "out_of_order"]

aten = torch.ops.aten
_VIEWS = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten._reshape_alias.default,
        aten.unflatten.int,
        aten.flatten.using_ints,
        aten.alias.default,
        aten.view_as.default,
    }
)
_Shape = tuple[int, ...]
_Blocks = Fraction | int | None  # None: nobody knows


class _Step(NamedTuple):
    """An operation: the tensors it took and made by number, and how it moves elements."""

    func: Any
    took: tuple[int, ...]
    made: tuple[int, ...]
    view: bool = False
    joined: int | None = None  # the dim of a cat
    repeats: _Shape = ()


@cache
def _kind(func: Any) -> tuple[bool, bool, bool]:
    """Whether an operator only gives a tensor another shape, makes a view of it, and takes part in what follows."""
    return func in _VIEWS, bool(getattr(func, "is_view", False)), func in (aten.cat.default, aten.repeat.default)


class Trace:
    """The operations of one run, and the shape of every tensor in them."""

    def __init__(self) -> None:
        self.steps: list[_Step] = []
        self.shapes: list[_Shape] = []
        self.seen_through: dict[int, int] = {}  # a view: what it is a view of
        self._numbers: dict[int, int] = {}  # by id
        self._held: list[Tensor] = []  # so that each keeps its id

    def number(self, tensor: Tensor) -> int:
        known = self._numbers.get(id(tensor))
        return self._new(tensor) if known is None else known

    def _new(self, tensor: Tensor) -> int:
        number = self._numbers[id(tensor)] = len(self.shapes)
        self.shapes.append(tuple(tensor.shape))
        self._held.append(tensor)
        return number

    def note(self, func: Any, args: Any, took: Sequence[Tensor], result: Any) -> None:
        reshapes, views, moves = _kind(func)
        if reshapes and args[0].shape == result.shape:  # such as the result of an autograd function that does nothing
            self._numbers[id(result)] = self.number(args[0])
            self._held.append(result)
            return
        before = tuple([self.number(t) for t in took])
        if isinstance(result, Tensor):
            made: tuple[int, ...] = (self.number(result),)
        else:
            made = tuple([self.number(t) for t in pytree.tree_leaves(result) if isinstance(t, Tensor)])
        if views and before:
            for n in made:
                if n != before[0]:
                    self.seen_through[n] = before[0]
        if not moves:
            self.steps.append(_Step(func, before, made, reshapes))
            return
        joined = (args[1] if len(args) > 1 else 0) if func is aten.cat.default else None
        repeats = tuple(args[1]) if func is aten.repeat.default else ()
        self.steps.append(_Step(func, before, made, reshapes, joined, repeats))


def out_of_order(local: Trace, whole: Trace, *, cut: bool = False) -> dict[int, str]:
    """{number of a tensor of the whole run: why its sharded dim is not in the order of the ranks}; raises ValueError
    where the runs are not alike. ``cut``: the whole run was stopped somewhere."""
    if len(local.steps) < len(whole.steps) or (len(local.steps) > len(whole.steps) and not cut):
        raise ValueError("the code does other things on one rank than without the others")
    follower = _Follower(local, whole)
    for here, there in zip(local.steps, whole.steps, strict=False):
        if (here.func, len(here.took), len(here.made)) != (there.func, len(there.took), len(there.made)):
            raise ValueError(f"the code does {here.func} on one rank and {there.func} without the others")
        follower.follow(here, there)
    return follower.why


@lru_cache(maxsize=4096)
def _grown_dim(here: _Shape, there: _Shape) -> int | None:
    """The dim in which a tensor is larger without the other ranks; -1 where several are."""
    grown = [d for d, (x, y) in enumerate(zip(here, there, strict=False)) if x != y]
    if not grown and len(here) == len(there):
        return None
    return grown[0] if len(grown) == 1 and len(here) == len(there) else -1


class _Follower:
    def __init__(self, local: Trace, whole: Trace) -> None:
        self.local, self.whole = local, whole
        self.blocks: dict[int, _Blocks] = {}  # of tensors of the whole run that are not in order
        self.why: dict[int, str] = {}

    def follow(self, here: _Step, there: _Step) -> None:
        took = [
            (n, d) for m, n in zip(here.took, there.took, strict=True) if (d := self._sharded_dim(m, n)) is not None
        ]
        for m, n in zip(here.made, there.made, strict=True):
            self.blocks.pop(n, None)  # written in place
            dim = self._sharded_dim(m, n) if took else None
            if dim is None:
                continue
            blocks = self._after(there, took, n, dim)
            if blocks != 1:
                self.blocks[n] = blocks
                self.why[n] = self._because(here, there, took, m, n)
                if n in there.took:
                    self._written_through(n)

    def _written_through(self, n: int) -> None:
        """What a tensor is a view of is no better than what was written into it."""
        why = self.why[n]
        while n in self.whole.seen_through:
            n = self.whole.seen_through[n]
            self.blocks[n], self.why[n] = None, why

    def _sharded_dim(self, m: int, n: int) -> int | None:
        return _grown_dim(self.local.shapes[m], self.whole.shapes[n])

    def _after(self, step: _Step, took: list[tuple[int, int]], made: int, dim: int) -> _Blocks:
        known = {self.blocks.get(n, 1) for n, _ in took}
        if dim < 0 or len(known) > 1 or None in known or any(d < 0 for _, d in took):
            return None
        blocks = known.pop()
        assert blocks is not None
        n, before = took[0]
        if step.view:
            outer = prod(self.whole.shapes[n][:before]) * blocks
            inner = prod(self.whole.shapes[made][:dim])
            return 1 if outer == inner else Fraction(outer, inner)
        if step.joined is not None and len(took) > 1 and step.joined % len(self.whole.shapes[made]) == dim:
            return None
        if step.repeats and step.repeats[dim] != 1:
            return None
        return blocks

    def _because(self, here: _Step, there: _Step, took: list[tuple[int, int]], m: int, n: int) -> str:
        earlier = next((self.why[k] for k, _ in took if self.blocks.get(k, 1) != 1 and k in self.why), None)
        if earlier is not None:
            return earlier
        place = there.took.index(took[0][0])
        a, b = self.local.shapes[here.took[place]], self.whole.shapes[there.took[place]]
        return (
            f"{a} became {self.local.shapes[m]} on one rank, and {b} became {self.whole.shapes[n]} without the others, "
            "so that the sharded dim is not in the order of the ranks"
        )
