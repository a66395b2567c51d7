"""Edits of single elements: steering, scaling, ablation, patching, noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flex_model.edits.like import Held, beside, like
from flex_model.edits.places import Positions, When
from flex_model.edits.preset import preset
from flex_model.errors import EditError
from flex_model.routing.part import WHOLE, Part

__all__ = ["add", "clamp", "mean", "noise", "patch", "patch_rows", "replace", "resample", "scale", "zero"]

Edit = Callable[..., Tensor]  # of a value, or of a part of it and which part that is


@preset(by_parts=True)
def add(
    vector: Tensor | Held,
    *,
    scale: float = 1.0,
    normalize: bool = False,
    positions: Positions = None,
    when: When = "all",
) -> Edit:
    """Add ``scale * vector`` to the value (steering). ``vector`` broadcasts against it; dtype and device follow it.

    >>> add(torch.tensor([1.0, 2.0]), scale=2.0)(torch.zeros(1, 2)).tolist()
    [[2.0, 4.0]]

    ``normalize``: the vector is first divided by its length, so that ``scale`` is how far the value goes.
    """

    def edit(x: Tensor, part: Part = WHOLE) -> Tensor:
        step = beside(vector, x)
        if normalize:
            step = step / step.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        return x + scale * part(step)

    return edit


@preset(by_parts=True)
def scale(factor: float, *, positions: Positions = None, when: When = "all") -> Edit:
    """Multiply the value by ``factor``."""
    return lambda x, part=WHOLE: x * factor


@preset(by_parts=True)
def zero(
    index: int | Sequence[int] | None = None, *, dim: int = -1, positions: Positions = None, when: When = "all"
) -> Edit:
    """Set the value to zero: all of it, or the given places of ``dim`` (units, or heads where they have a dim).

    >>> zero([1])(torch.ones(2, 3)).tolist()
    [[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]]
    """
    return lambda x, part=WHOLE: _replaced(x, torch.zeros_like(x), index, dim, part)


@preset(by_parts=True)
def replace(
    value: float | Tensor | Held,
    index: int | Sequence[int] | None = None,
    *,
    dim: int = -1,
    positions: Positions = None,
    when: When = "all",
) -> Edit:
    """Put ``value`` in the place of the value, broadcast against it: everywhere, or at the given places of ``dim``.

    >>> replace(5.0, [0])(torch.zeros(1, 2)).tolist()
    [[5.0, 0.0]]
    """

    def edit(x: Tensor, part: Part = WHOLE) -> Tensor:
        new = torch.full_like(x, value) if isinstance(value, (int, float)) else part(beside(value, x))
        return _replaced(x, new, index, dim, part)

    return edit


@preset()
def patch(values: Tensor | Held, *, positions: Positions = None, when: When = "all") -> Edit:
    """Put captured values in the place of the value; they must have its shape, or one row for all.

    >>> patch(torch.ones(1, 2))(torch.zeros(3, 2)).tolist()
    [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]

    ``acts.ref(name)`` gives values that stayed where they are (``deliver="local"``). To patch from another input in the
    same batch, see ``patch_rows``.
    """

    def edit(x: Tensor) -> Tensor:
        new = beside(values, x)
        if new.shape != x.shape and new.shape != (1, *x.shape[1:]) and new.shape != x.shape[1:]:
            raise EditError(
                f"the values to patch in have the shape {tuple(new.shape)}, the value {tuple(x.shape)}; "
                f"capture them from inputs of the same shape, or use edits.replace, which broadcasts.",
                page="preset-arguments",
            )
        return _replaced(x, new, None, -1)

    return edit


@preset(by_parts=True)
def mean(values: Tensor | Held, *, positions: Positions = None, when: When = "all") -> Edit:
    """Mean ablation: put the mean over the rows of ``values`` in the place of every row.

    >>> mean(torch.tensor([[1.0, 3.0], [3.0, 5.0]]))(torch.zeros(1, 2)).tolist()
    [[2.0, 4.0]]

    ``values`` is ``(N, ..., D)``: what was captured on other inputs. All dims but the last are averaged over. Wang et
    al., "Interpretability in the Wild" (2022).
    """

    def edit(x: Tensor, part: Part = WHOLE) -> Tensor:
        held = values if isinstance(values, Tensor) else values.value()
        average = held.mean(tuple(range(held.dim() - 1))) if held.dim() > 1 else held
        return _replaced(x, part(beside(average, x)), None, -1)

    return edit


@preset(run="every_rank", random=True)
def resample(values: Tensor | None = None, *, positions: Positions = None, when: When = "all") -> Edit:
    """Resample ablation: put another row in the place of each row.

    They are drawn from ``values`` ``(N, ...)``, captured on other inputs, or else from the batch itself, where every
    row gets another's. Drawn from ``fm.seed``, the site and the call. Chan et al., "Causal Scrubbing" (2022).
    """

    def edit(x: Tensor) -> Tensor:
        if values is None:
            if len(x) < 2:
                raise EditError(
                    "edits.resample() needs a batch of at least two rows; give it values=.", page="preset-arguments"
                )
            shift = 1 + int(torch.randint(len(x) - 1, ()))
            return x.roll(shift, 0)
        rows = torch.randint(len(values), (len(x),), device="cpu")
        return beside(values[rows.to(values.device)], x)

    return edit


@preset(run="every_rank")
def patch_rows(
    source: int | Sequence[int], to: int | Sequence[int], *, positions: Positions = None, when: When = "all"
) -> Edit:
    """Within a batch, put the values of the rows ``source`` in the place of those of the rows ``to``.

    >>> patch_rows(0, 1)(torch.tensor([[1.0], [2.0]])).tolist()
    [[1.0], [1.0]]
    """
    pairs = list(zip(*([i] if isinstance(i, int) else list(i) for i in (to, source)), strict=True))

    def edit(x: Tensor) -> Tensor:
        if (most := max(max(pair) for pair in pairs)) >= len(x):
            raise EditError(f"there is no row {most} in a batch of {len(x)}.", page="preset-arguments")
        rows = torch.arange(len(x))
        for target, origin in pairs:
            rows[target] = origin
        return x[rows.to(x.device)]

    return edit


@preset(by_parts=True)
def clamp(
    min: float | None = None, max: float | None = None, *, positions: Positions = None, when: When = "all"
) -> Edit:
    """Keep every element between ``min`` and ``max``."""
    return lambda x, part=WHOLE: x.clamp(min, max)


@preset(random=True)
def noise(std: float = 1.0, *, positions: Positions = None, when: When = "all") -> Edit:
    """Add Gaussian noise: the same on one process and on many, drawn from ``fm.seed``, the site and the call."""

    def edit(x: Tensor) -> Tensor:
        drawn = torch.randn(x.shape, dtype=torch.float32, device=x.device)
        return x + like((std * drawn).to(x.dtype), x)

    return edit


def _replaced(
    x: Tensor, new: Tensor, index: int | Sequence[int] | None, dim: int, part: Part = WHOLE
) -> Tensor:
    """``new`` where ``dim`` is one of ``index``, else ``x``; everywhere without ``index``."""
    if index is None and new.shape == x.shape and getattr(new, "placements", None) == getattr(x, "placements", None):
        return new
    count = part.size(x, dim) if index is not None else 1
    places = torch.ones(count, dtype=torch.bool, device=x.device)
    if index is not None:
        asked = [index] if isinstance(index, int) else list(index)
        if asked and not -count <= min(asked) <= max(asked) < count:
            raise EditError(f"index {asked} is not within the {count} places of dim {dim}.", page="preset-arguments")
        places.zero_()[asked] = True
    size = [1] * x.dim()
    size[dim] = count
    return torch.where(like(part(places.view(size)), x), new, x)
