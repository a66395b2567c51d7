"""The sequence under context parallelism: which tokens of it a rank holds, and inputs of twice its length.

Shapes cannot say whether a rank holds the r-th piece, or the pieces r and 2w-1-r of zig-zag. The positions among a
call's inputs can: they name every token that is here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement

from flex_model.layout.layout import ZigZag, my_part
from flex_model.trees import Leaf, copy_tree, tensors

__all__ = ["Order", "double_sequence", "order_by_positions", "sequence_length"]

Order = Callable[[int], Placement]  # the placement of a value whose dim it is; ``ZigZag`` and ``Shard`` themselves


def sequence_length(inputs: Any, dim: int = 0) -> int | None:
    """The length of the sequence here, not of the whole, by the first input tensor that has two dims: ``dim`` is where
    the inputs hold the batch, and the other is the sequence's."""
    return next((t.shape[1 - dim] for t in tensors(inputs) if t.dim() > 1), None)


def order_by_positions(inputs: Sequence[Leaf], size: int, index: int) -> Order | str:
    """How ``size`` ranks share the sequence, by the positions that the ``index``-th has; or why that is unknown."""
    length = sequence_length([leaf.tensor for leaf in inputs])
    given = [x for x in inputs if "pos" in x.path.rpartition(".")[2] and _are_positions(x.tensor, length)]
    if length is None or not given:
        return "no positions are among the inputs"
    orders = [_order(leaf.tensor, length, size, index) for leaf in given]
    if orders[0] is None or any(o is not orders[0] for o in orders):
        return (
            f"the positions ({given[0].path}) on this rank are neither those of contiguous pieces nor of zig-zag ones"
        )
    return orders[0]


def _are_positions(tensor: Tensor, length: int | None) -> bool:
    integral = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype is not torch.bool
    return integral and tensor.dim() > 0 and tensor.shape[-1] == length


def _order(positions: Tensor, length: int, size: int, index: int) -> Order | None:
    whole = torch.arange(length * size, device=positions.device)
    ways: list[Order] = [Shard, ZigZag] if length % 2 == 0 else [Shard]
    for way in ways:
        if bool((positions == my_part(whole, way(0), [length] * size, index)).all()):
            return way
    return None


def double_sequence(inputs: Any, *, vectors: bool = True, dim: int = 0) -> Any:
    """``inputs`` with the sequence twice over, the second time by one token on: ``[a b c | c a b]``.

    Attention that follows positions sees every token twice, which changes nothing; so whatever follows the tokens comes
    out as ``[f(a) f(b) f(c) | f(c) f(a) f(b)]``. ``vectors=False`` leaves one-dim tensors alone.
    """
    length = sequence_length(inputs, dim)

    def twice(tensor: Tensor) -> Tensor:
        if tensor.dim() > 1 and tensor.shape[1 - dim] == length:
            return torch.cat([tensor, tensor.roll(1, 1 - dim)], 1 - dim)
        if vectors and tensor.dim() == 1 and tensor.shape[0] == length:
            return torch.cat([tensor, tensor.roll(1)])
        return tensor

    return copy_tree(inputs, twice)
