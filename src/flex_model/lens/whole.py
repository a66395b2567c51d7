"""``whole``: a captured value, where it is one tensor."""

from __future__ import annotations

from torch import Tensor

from flex_model.core.captured import Captured
from flex_model.errors import DeliveryError

__all__ = ["whole"]


def whole(acts: Captured, key: str) -> Tensor:
    """A captured value that is one tensor, which it is not where ranks' inputs differ in length."""
    value = acts[key]
    if isinstance(value, Tensor):
        return value
    raise DeliveryError(
        f"{key!r} came in parts, because ranks' inputs have other lengths; pad them to one.", page="no-rectangle"
    )
