"""Steering vectors: directions of the residual stream that tell two kinds of inputs apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from flex_model import FlexModel, FlexModelError
from flex_model.edits import Preset, add
from flex_model.edits.places import last_columns
from flex_model.lens.inputs import Inputs, keywords
from flex_model.lens.probes.fit import Recipe, fit
from flex_model.lens.whole import whole
from flex_model.result import Result, lines, long_table

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

__all__ = ["SteeringVector", "steering_vector"]

Method = Literal["mean", "pca", "probe"]


@dataclass(frozen=True, slots=True)
class SteeringVector(Result):
    """``vector`` (D,), from the negative inputs to the positive; ``separation`` (positive, negative): the mean of each
    kind along it, in units of its own spread."""

    vector: Tensor
    separation: tuple[float, float]
    component: str
    layer: int

    def edit(self, scale: float = 1.0, **where: Any) -> Preset:
        """The preset that adds it: ``fm.edit(fm.at(found.component, found.layer), found.edit(4.0))``."""
        return add(self.vector, scale=scale, **where)

    def to_dataframe(self) -> DataFrame:
        """unit, weight."""
        return long_table(("unit",), weight=self.vector)

    def plot(self) -> Figure:
        """All weights, sorted, with their units under the pointer."""
        weights, units = self.vector.sort(descending=True)
        title = f"Steering vector, {self.component!r} of layer {self.layer}"
        curve = {"weights": (torch.arange(len(weights)), weights)}
        figure = lines(curve, title=title, x="units, sorted by weight", y="weight")
        figure.update_traces(text=[f"unit {int(u)}" for u in units], hoverinfo="text+y", marker={"size": 4})
        return figure


@torch.no_grad()
def steering_vector(
    fm: FlexModel,
    positive: Inputs,
    negative: Inputs,
    *,
    layer: int,
    component: str = "resid_post",
    method: Method = "mean",
) -> SteeringVector:
    """A direction from ``negative`` inputs to ``positive`` ones, at their last tokens that are not padding.

    >>> found = steering_vector(fm, kind, unkind, layer=12)                                 # doctest: +SKIP
    >>> with fm.edit(fm.at("resid_post", 12), found.edit(scale=4.0)):                       # doctest: +SKIP
    ...     fm.generate(**prompt)

    Inputs are token ids (B, S), or the model's keywords. ``method="mean"``: the difference of the means (Turner et al.,
    "Activation Addition", 2023); ``"pca"``: the first principal component of the differences of paired rows (Zou et
    al., "Representation Engineering", 2023); ``"probe"``: the direction of a linear probe that tells the two apart (see
    ``train_probe``). Both are as long as the difference of the means. Collective; every rank gets it.
    """
    if method not in get_args(Method):
        raise FlexModelError(f"method={method!r} is unknown; expected 'mean', 'pca' or 'probe'.", page="bad-argument")
    plus, minus = (_last_tokens(fm, inputs, component, layer) for inputs in (positive, negative))
    vector = plus.mean(0) - minus.mean(0)
    if method == "pca":
        if len(plus) != len(minus):
            raise FlexModelError(
                f"method='pca' needs pairs, got {len(plus)} positive rows and {len(minus)} negative ones.",
                page="bad-argument",
            )
        first = torch.linalg.svd(plus - minus, full_matrices=False).Vh[0]
        vector = first * torch.sign(first @ vector) * vector.norm()
    if method == "probe":
        labels = torch.cat([torch.ones(len(plus)), torch.zeros(len(minus))]).long()
        weight = fit(torch.cat([plus, minus]).cpu(), labels, None, Recipe()).weight
        direction = (weight[1] - weight[0]).to(vector.device)
        vector = direction / direction.norm().clamp_min(1e-12) * vector.norm()
    unit = vector / vector.norm().clamp_min(1e-12)
    along = [rows @ unit for rows in (plus, minus)]
    spread = torch.cat([a - a.mean() for a in along]).std().clamp_min(1e-12)
    middle = (along[0].mean() + along[1].mean()) / 2
    separation = tuple(float((a.mean() - middle) / spread) for a in along)
    index = layer % len(fm.at(component).keys)
    return SteeringVector(vector.float(), (separation[0], separation[1]), component, index)


def _last_tokens(fm: FlexModel, inputs: Inputs, component: str, layer: int) -> Tensor:
    """(B, D) in float64: the value at each row's last token that is not padding."""
    place, inputs = fm.at(component, layer), keywords(inputs)
    acts = fm.capture(place).run(**inputs)
    value = whole(acts, place.key).double()
    mask = inputs.get("attention_mask")
    if mask is None:
        return value[:, -1]
    last = last_columns(fm.full_batch(mask).to(value.device))
    return value[torch.arange(len(value)), last]
