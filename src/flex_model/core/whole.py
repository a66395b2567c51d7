"""The whole output and the whole batch, from one rank's part of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from flex_model.core.inference import Spot
from flex_model.errors import LayoutError
from flex_model.layout.layout import Layout
from flex_model.routing.route import Route
from flex_model.trees import find_leaves, replace_leaves

if TYPE_CHECKING:
    from flex_model.core.runtime import Runtime

__all__ = ["full_batch", "full_output"]


def full_output(runtime: Runtime, output: Any) -> Any:
    """Every tensor of a model's output, unsharded; layouts not needed so far are found from the last inputs."""
    if not runtime.mesh.axes:
        return output
    runtime.mesh.prepare()
    inference = runtime.inference
    leaves = find_leaves(output)
    forms = {leaf.index: inference.form(Spot("", "out", leaf.index), leaf.tensor) for leaf in leaves}
    if any(inference.lookup(f) is None for f in forms.values()):
        args, kwargs = runtime.last_inputs
        with runtime.silent():
            inference.new_call(args, kwargs)
            inference.begin(runtime.outermost, args, kwargs, {("", "out", "full_output"): runtime.root})
            claims = {
                forms[leaf.index]: inference.claim(forms[leaf.index], leaf.tensor, runtime.root, 0, None)
                for leaf in leaves
                if inference.lookup(forms[leaf.index]) is None
            }
            inference.end()
        inference.settle(claims)
    new = {}
    for leaf in leaves:
        layout = inference.known[forms[leaf.index]]
        if isinstance(layout, LayoutError):
            raise layout
        local = leaf.tensor.to_local() if isinstance(leaf.tensor, DTensor) else leaf.tensor
        new[leaf.index] = Route(runtime.mesh, layout, local).unshard(local)
    return replace_leaves(output, new)


def full_batch(runtime: Runtime, batch: Any) -> Any:
    """Every tensor with a batch dim, concatenated over the data axes in capture order."""
    mesh = runtime.mesh
    data = [a.kind == "data" for a in mesh.axes]
    if not any(data):
        return batch
    mesh.prepare()
    layout = Layout(tuple(Shard(0) if d else Replicate() for d in data), "full_batch", ragged=tuple(data))
    new = {}
    for leaf in find_leaves(batch):
        if leaf.tensor.dim():
            new[leaf.index] = _whole(mesh, layout, leaf.tensor)
    return replace_leaves(batch, new)


def _whole(mesh: Any, layout: Layout, tensor: Tensor) -> Tensor:
    route = Route(mesh, layout, tensor)
    if route.own_part:
        raise LayoutError(
            f"the batch has the shape {tuple(tensor.shape)} here and no matching one on other ranks; pad it."
        )
    return route.unshard(tensor)
