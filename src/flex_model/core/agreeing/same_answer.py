"""Check mode: do all ranks that ran an edit have the same result?"""

from __future__ import annotations

import torch
from torch import Tensor

from flex_model.core.bound import Bound
from flex_model.errors import MismatchError
from flex_model.layout.mesh import ModelMesh
from flex_model.routing.collectives import all_gather_parts, extremes
from flex_model.routing.watch import mark_shared

__all__ = ["check_same_answer"]


def check_same_answer(bound: Bound, mesh: ModelMesh, out: Tensor) -> None:
    """Compare the results of an every-rank edit along the axes it was unsharded over. Raises MismatchError, on every
    rank of the line, with the first element that differs and the ranks that differ in it. Collective."""
    out = out.detach()
    for axis in range(len(mesh.axes)) if bound.axes is None else bound.axes:
        group, ranks = mesh.group(axis), mesh.axes[axis].ranks
        numbers = torch.view_as_real(out) if out.is_complex() else out
        flat = numbers.to(torch.double if numbers.is_floating_point() else torch.long).flatten()
        low, high = extremes(torch.nan_to_num(flat) if flat.is_floating_point() else flat, group)
        if torch.equal(low, high):
            continue
        first = int((low != high).nonzero()[0])
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), numbers.shape))
        values = [v.item() for v in all_gather_parts(flat[first].reshape(1), [(1,)] * len(ranks), group)]
        usual = max(set(values), key=values.count)
        other = next((rank for rank, value in zip(ranks, values, strict=True) if value != usual), ranks[0])
        error = MismatchError(
            f"{bound.where}: rank {other} has another result of the editing function than the others: element "
            f"{place} is {dict(zip(ranks, values, strict=True))} by rank; make it depend on the value alone, or pass "
            f"run='one_rank' (or random=True, if it draws random numbers)."
        )
        mark_shared(error)
        raise error
