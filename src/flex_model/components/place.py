"""``Place``: what ``fm.at`` returns, one part of a transformer in one layer or several; goes where a pattern goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from flex_model.errors import ComponentError
from flex_model.routing.selection import Selection

__all__ = ["COMPONENTS", "IN_LAYERS", "WITH_HEADS", "Place", "Spot", "Sum"]

WITH_HEADS = ("q", "k", "v", "z", "pattern")
IN_LAYERS = (
    *("resid_pre", "resid_mid", "resid_post", "ln1", "ln2", "attn_out", "mlp_out"),
    *WITH_HEADS,
    *("mlp_pre", "mlp_post", "router"),
)
COMPONENTS = ("embed", "pos_embed", *IN_LAYERS, "ln_final", "unembed")


@dataclass(frozen=True, slots=True)
class Sum:
    """Modules of one layer whose values must add up: input + attn = mid, mid + mlp = output.

    ``mid`` is the module whose input is the sum after attention; None where attention and MLP run side by side.
    """

    layer: str
    attn: str
    mlp: str
    mid: str | None


@dataclass(frozen=True, slots=True)
class Spot:
    """One component in one layer, as a hook needs it."""

    key: str
    name: str
    hook_type: Literal["forward", "forward_pre"]
    unpack_idx: int = 0
    select: Selection | None = field(default=None, compare=False)
    read_only: str = ""  # why an edit here would not change what the component is
    sum: Sum | None = None  # what must hold for the component to be where it was found
    some_heads: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """A component of a model; ``str(place)`` is the key of what is captured there.

    >>> place = Place("z", (Spot("@z.5.3", "model.layers.5.self_attn.o_proj", "forward_pre"),))
    >>> str(place), place.spots[0].name
    ('@z.5.3', 'model.layers.5.self_attn.o_proj')
    """

    component: str
    spots: tuple[Spot, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of what is captured here, one a layer, in the order of the layers."""
        return tuple(s.key for s in self.spots)

    @property
    def key(self) -> str:
        """The only key; raises ComponentError if there are several layers."""
        if len(self.spots) > 1:
            raise ComponentError(
                f"{self.component!r} stands for {len(self.spots)} values, {self.keys[0]!r} to {self.keys[-1]!r}; "
                f"name one layer, or take all of them with acts.stack."
            )
        return self.spots[0].key

    def __str__(self) -> str:
        return self.key if len(self.spots) == 1 else f"@{self.component}"
