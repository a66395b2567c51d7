"""``Places``: at which tokens an edit applies, and in which part of a generation.

Positions are columns of the sequence, those that a cache holds included. A mask is made on each rank for the tokens
it has, and lies as the value does, so that nothing moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from flex_model.edits.like import like
from flex_model.errors import EditError

if TYPE_CHECKING:
    from flex_model.core.hook_function import Call

__all__ = ["Places", "Positions", "When", "last_columns"]

Positions = Literal["last"] | int | Sequence[int] | Tensor | None
When = Literal["all", "prefill", "decode"]


class Places:
    """``positions``: ``"last"`` (the last token that is not padding), numbers, or a boolean mask ``(S,)`` or
    ``(B, S)``; None: everywhere. ``when``: in the prefill, in decoding steps, or in both."""

    def __init__(self, positions: Positions, when: When) -> None:
        if when not in get_args(When):
            raise EditError(
                f"when={when!r} is unknown; expected 'all', 'prefill' or 'decode'.", page="preset-arguments"
            )
        if isinstance(positions, str) and positions != "last":
            raise EditError(
                f"positions={positions!r} is unknown; expected 'last', numbers or a mask.", page="preset-arguments"
            )
        if isinstance(positions, Tensor) and positions.dtype != torch.bool:
            positions = positions.tolist()
        self._positions, self._when = positions, when

    @property
    def some(self) -> bool:
        """Whether there are places where the edit does not apply."""
        return self._positions is not None or self._when != "all"

    def now(self, call: Call | None) -> bool:
        return self._when == "all" or call is None or call.phase == self._when

    def mask(self, x: Tensor, call: Call | None) -> Tensor | None:
        """Where to edit, as a mask that broadcasts against ``x``; None: everywhere."""
        positions = self._positions
        if positions is None:
            return None
        if x.dim() < 2:
            raise EditError(
                f"positions= needs a value (batch, sequence, ...), got the shape {tuple(x.shape)}; "
                f"leave positions out, or hook a module whose value has them.",
                page="preset-arguments",
            )
        if isinstance(positions, str):
            return _of_rows(_last(x, call), x)
        length, past = x.shape[1], 0 if call is None else call.past
        if isinstance(positions, Tensor):
            mask = positions.to(x.device)
            if mask.shape[-1] != length or (mask.dim() > 1 and mask.shape[0] not in (1, x.shape[0])):
                raise EditError(
                    f"the mask of positions is {tuple(mask.shape)}, the value {tuple(x.shape)}; "
                    f"a mask is (S,) or (B, S) of the whole batch.",
                    page="preset-arguments",
                )
            mask = mask if mask.dim() > 1 else mask[None]
        else:
            columns = torch.arange(past, past + length, device=x.device)
            wanted = torch.tensor([positions] if isinstance(positions, int) else list(positions), device=x.device)
            wanted = torch.where(wanted < 0, wanted + past + length, wanted)
            mask = torch.isin(columns, wanted)[None]
        return like(mask.view(*mask.shape, *[1] * (x.dim() - 2)), x)


def _last(x: Tensor, call: Call | None) -> Tensor:
    """(rows here, S): the last token of each row that is not padding."""
    length = x.shape[1]
    real = None if call is None else call.attention_mask
    columns = torch.arange(length, device=x.device)
    if real is None or real.dim() != 2:
        return (columns == length - 1)[None]
    return columns == last_columns(real[:, -length:].to(x.device))[:, None]


def last_columns(mask: Tensor) -> Tensor:
    """``(B,)``: the column of each row's last token that is not padding, by an attention mask ``(B, S)``; -1: none.

    >>> last_columns(torch.tensor([[1, 1, 0], [0, 1, 1]])).tolist()
    [1, 2]
    """
    columns = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask.bool(), columns, -1).amax(1)


def _of_rows(mask: Tensor, x: Tensor) -> Tensor:
    """A mask of this rank's rows, beside a value of them or of the whole batch."""
    mask = mask.view(*mask.shape, *[1] * (x.dim() - 2))
    if not isinstance(x, DTensor):
        if mask.shape[0] not in (1, x.shape[0]):
            raise EditError(
                f"positions='last' is known for the {mask.shape[0]} rows of this rank, and the edit sees {x.shape[0]}; "
                f"use run='sharded', or axes= without the data axes.",
                page="preset-arguments",
            )
        return mask
    if mask.shape[0] == 1:
        return like(mask, x)
    placements: list[Any] = [Shard(0) if p.is_shard(0) else Replicate() for p in x.placements]
    shape = torch.Size((x.shape[0], *mask.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(mask, x.device_mesh, placements, run_check=False, shape=shape, stride=stride)
