"""``Guarded``: what an edit does on shards, where torch's DTensor would silently do something else, is an error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from flex_model.errors import EditError
from flex_model.layout.layout import shard_dim

__all__ = ["Guarded"]

aten = torch.ops.aten
_KEEPS_SHARDS = frozenset(
    {
        aten.detach.default,
        aten.alias.default,
        aten.clone.default,
        aten._to_copy.default,
        aten.full_like.default,
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.empty_like.default,
    }
)
_CUMULATIVE = frozenset({aten.cumsum.default, aten.cumprod.default, aten.logcumsumexp.default})


class Guarded(TorchDispatchMode):
    """DTensor drops writes through a view that crosses the sharded dim: any write through a view is an error here.

    So is drawing random numbers for a value: each rank would draw those of a shard, and not of the whole. ``value``, if
    given, has shards of sizes that DTensor does not count with: only what leaves every element in its place is right.
    """

    def __init__(self, where: str, value: DTensor | None = None) -> None:
        super().__init__()
        self.where, self.value = where, value
        self.views: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            self._check_writes(func, args)
        involved = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, DTensor)]
        if torch.Tag.nondeterministic_seeded in func.tags and involved:
            raise EditError(
                f"{self.where}: an edit with run='sharded' draws random numbers ({func}), which would not be those of "
                f"the whole value; use run='every_rank'.",
                page="edit-draws-random",
            )
        if self.value is not None and any(self._is_sharded(a) for a in involved):
            self._check_sizes(func, involved, self.value)
        if func in _CUMULATIVE and isinstance(args[0], DTensor):
            self._check_dim(func, args[0], args[1])
        out = func(*args, **(kwargs or {}))
        if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, DTensor):
                    self.views[id(tensor)] = tensor
        return out

    def _check_writes(self, func: Any, args: Any) -> None:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(value, DTensor) and id(value) in self.views:
                raise EditError(
                    f"{self.where}: an edit with run='sharded' writes in place through a view ({func}), "
                    f"which could be lost; use an out-of-place operation such as torch.where or slice_scatter.",
                    page="edit-writes-in-place",
                )

    def _check_dim(self, func: Any, tensor: DTensor, dim: int) -> None:
        """DTensor does not see that a negative dim is a sharded one, and each rank would begin anew."""
        if dim < 0 and any(shard_dim(p) == dim + tensor.dim() for p in tensor.placements):
            raise EditError(
                f"{self.where}: {func} of a sharded dim that is counted from the end is wrong on shards, which DTensor "
                f"does not notice; write dim={dim + tensor.dim()} for dim={dim}, or use run='every_rank'.",
                page="edit-not-sharded",
            )

    @staticmethod
    def _is_sharded(tensor: DTensor) -> bool:
        return any(shard_dim(p) is not None for p in tensor.placements)

    def _check_sizes(self, func: Any, involved: list[DTensor], value: DTensor) -> None:
        fits = all(a.placements == value.placements or self._spreads(a, value) for a in involved)
        if not fits or not (torch.Tag.pointwise in func.tags or func in _KEEPS_SHARDS):
            raise EditError(
                f"{self.where}: ranks hold shards of sizes that DTensor does not count with (it takes the first to be "
                f"the largest), so that run='sharded' can work on elements alone, not do {func}; use run='every_rank'.",
                page="edit-not-sharded",
            )

    @staticmethod
    def _spreads(other: DTensor, value: DTensor) -> bool:
        """Whether a replica is the same for every position of the sharded dims."""
        if Guarded._is_sharded(other):
            return False
        dims = (d for p in value.placements if (d := shard_dim(p)) is not None)
        return all(other.dim() < value.dim() - d or other.shape[d - value.dim()] == 1 for d in dims)
