"""Edits of each token's vector as a whole: directions, sparse autoencoders, modules. Its last dim must be whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flex_model.edits.like import per_token
from flex_model.edits.places import Positions, When
from flex_model.edits.preset import Preset, preset
from flex_model.errors import EditError

__all__ = ["LowRank", "keep_only", "module", "project_out", "sae"]

Edit = Callable[[Tensor], Tensor]


class Autoencoder(Protocol):
    """What ``sae`` can splice in, such as SAELens's."""

    def encode(self, x: Tensor) -> Tensor: ...

    def decode(self, features: Tensor) -> Tensor: ...


@preset()
def project_out(directions: Tensor, *, positions: Positions = None, when: When = "all") -> Edit:
    """Take the part along some directions out of each token's vector.

    >>> project_out(torch.tensor([1.0, 0.0]))(torch.tensor([[3.0, 4.0]])).tolist()
    [[0.0, 4.0]]

    ``directions`` is ``(D,)`` or ``(k, D)``: the subspace they span, whatever their lengths and angles.
    """
    basis = _basis(directions)
    return lambda x: per_token(lambda v: v - _along(v, basis), x)


@preset()
def keep_only(directions: Tensor, *, positions: Positions = None, when: When = "all") -> Edit:
    """Keep only the part of each token's vector along some directions, ``(D,)`` or ``(k, D)``.

    >>> keep_only(torch.tensor([2.0, 0.0]))(torch.tensor([[3.0, 4.0]])).tolist()
    [[3.0, 0.0]]
    """
    basis = _basis(directions)
    return lambda x: per_token(lambda v: _along(v, basis), x)


@preset()
def sae(
    autoencoder: Autoencoder,
    edit: Preset | Callable[[Tensor], Tensor] | None = None,
    *,
    keep_error: bool = True,
    positions: Positions = None,
    when: When = "all",
) -> Edit:
    """Splice in a sparse autoencoder, and edit its features: ``decode(edit(encode(x)))``.

    ``keep_error``: what it does not reconstruct is added again, so that without ``edit`` nothing changes; else the
    value is what the autoencoder makes of it. It is a frozen module with ``encode`` and ``decode``; its dtype is used.
    """
    if not (hasattr(autoencoder, "encode") and hasattr(autoencoder, "decode")):
        raise EditError(
            f"edits.sae needs a module with encode and decode, got {type(autoencoder).__name__}.",
            page="preset-arguments",
        )

    def splice(x: Tensor) -> Tensor:
        own = next(iter(autoencoder.parameters()), x) if isinstance(autoencoder, nn.Module) else x
        features = autoencoder.encode(x.to(device=own.device, dtype=own.dtype))
        new = features if edit is None else edit(features)
        out = autoencoder.decode(features if new is None else new)
        out = out.to(device=x.device, dtype=x.dtype)
        if not keep_error:
            return out
        return x + out - autoencoder.decode(features).to(device=x.device, dtype=x.dtype)

    return lambda x: per_token(splice, x)


class LowRank(nn.Module):
    """``x -> up(down(x))`` with ``rank`` dims in between, zero at first: a trainable edit of little size.

    >>> fm.register_trainable_module("steer", edits.LowRank(768, rank=4))   # doctest: +SKIP
    >>> with fm.edit("model.layers.3", edits.module("steer")):              # doctest: +SKIP
    ...     fm(ids).logits.sum().backward()

    Hu et al., "LoRA" (2021), of a value instead of a weight.
    """

    def __init__(self, width: int, rank: int = 8, *, scale: float = 1.0) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        self.scale = scale
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.down(x)) * self.scale
        return out


@preset(run="every_rank", takes_modules=True)
def module(name: str, *, residual: bool = True, positions: Positions = None, when: When = "all") -> Callable[..., Any]:
    """Edit with a trainable module registered as ``name``: ``x + module(x)``, or ``module(x)`` without ``residual``."""

    def edit(x: Tensor, modules: nn.ModuleDict) -> Tensor:
        if name not in modules:
            raise EditError(
                f"there is no trainable module {name!r}; call fm.register_trainable_module({name!r}, ...) first.",
                page="preset-arguments",
            )
        out: Tensor = modules[name](x)
        return x + out if residual else out

    return edit


def _basis(directions: Tensor) -> Tensor:
    """(k, D), orthonormal, in float64."""
    rows = directions.detach().double().cpu()
    rows = rows if rows.dim() > 1 else rows[None]
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    kept: Tensor = sizes > sizes.max() * 1e-10
    if not bool(kept.any()):
        raise EditError("all directions are zero; there is nothing to project on.", page="preset-arguments")
    out: Tensor = basis[kept]
    return out


def _along(v: Tensor, basis: Tensor) -> Tensor:
    if v.shape[-1] != basis.shape[-1]:
        raise EditError(
            f"directions have {basis.shape[-1]} elements, the value's last dim {v.shape[-1]}.", page="preset-arguments"
        )
    exact = torch.float64 if v.dtype == torch.float64 else torch.float32
    basis = basis.to(device=v.device, dtype=exact)
    along: Tensor = (v.to(exact) @ basis.T) @ basis
    return along.to(v.dtype)
