"""The whole output and the whole batch, from one rank's part of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from flex_model.core.inference import Spot
from flex_model.core.naming.names import WRAPPERS
from flex_model.errors import EngineError, LayoutError
from flex_model.layout.copied import copied
from flex_model.layout.layout import Layout
from flex_model.layout.mesh import ModelMesh
from flex_model.layout.sequence import Order, sequence_length
from flex_model.layout.twin import stripped
from flex_model.routing.hop import Parcel
from flex_model.routing.route import Route
from flex_model.trees import find_leaves, replace_leaves

if TYPE_CHECKING:
    from flex_model.core.runtime import Runtime

__all__ = ["from_stage", "full_batch", "full_output", "full_parameter", "plain_copy", "whole_module"]


def full_output(runtime: Runtime, output: Any) -> Any:
    """The whole output on every rank, also of a pipeline that gives it on its last stage alone."""
    runtime.look()
    if not runtime.engines.parts:
        return _unsharded(runtime, output)
    last = runtime.names.stages.tables[-1]
    here = last.coordinate == runtime.whole.stage
    return from_stage(runtime, last.coordinate, _unsharded(runtime, output) if here else None)


def from_stage(runtime: Runtime, coordinate: int, value: Any) -> Any:
    """``value`` of the ranks at one place along the stage axis, on all ranks. Collective."""
    if runtime.whole.stage_axis is None:
        return value
    runtime.whole.prepare()
    found = []
    mine = [Parcel((), "all", value)] if coordinate == runtime.whole.stage else []
    runtime.outbox.hop.exchange(mine, runtime.device_of_values, lambda _, v: found.append(v))
    return found[0]


def _unsharded(runtime: Runtime, output: Any) -> Any:
    """Every tensor of a model's output, whole; layouts not needed so far are found from the last inputs."""
    if not runtime.mesh.axes:
        return output
    runtime.mesh.prepare()
    inference = runtime.inference
    leaves = find_leaves(output)
    forms = {leaf.index: inference.form(Spot("", "out", leaf.index), leaf.tensor) for leaf in leaves}
    if any(inference.lookup(f) is None for f in forms.values()):
        args, kwargs = runtime.last_inputs
        with runtime.silent():
            if runtime.engines.parts and not (args or kwargs):
                raise LayoutError(
                    "the output of this pipeline cannot be put together, because no hook has seen its last stage run; "
                    "take it with fm.capture('').",
                    page="pipeline-output",
                )
            root = list(runtime.names.places[""].values())[-1]
            outer = root if runtime.engines.parts else runtime.outermost
            inference.new_call(root, args, kwargs)
            inference.begin(outer, args, kwargs, {("", "out", "full_output"): root})
            claims = {
                forms[leaf.index]: inference.claim(forms[leaf.index], leaf.tensor, root, 0, None)
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


def full_parameter(runtime: Runtime, name: str) -> Tensor:
    """A full parameter on every rank, whichever stage has it. Collective."""
    holder = runtime.names.stages.holder(name, "param")
    if holder is None:
        return runtime.engines.full_parameter(*runtime.names.parameters[name])
    here = runtime.names.module_of(name, "param") is not None
    full = runtime.engines.full_parameter(*runtime.names.parameters[name]) if here else None
    found: Tensor = from_stage(runtime, holder.coordinate, full)
    return found


_SIMPLE = {
    "DDP",
    "replicate",
    "FSDP1",
    "FSDP2",
    "DTensor",
    "transformers",
    "accelerate",
    "PEFT",
    "experts",
    "pipelining",
}


def whole_module(runtime: Runtime, name: str) -> nn.Module:
    """A copy of a module with whole parameters, without hooks and engines, on every rank. Collective."""
    clean = runtime.names.clean(name, of="module")
    holder = runtime.names.stages.holder(clean, "out")
    if holder is None:
        return _whole_here(runtime, clean)
    found = _sent(runtime, clean) if runtime.names.module_of(clean, "out") is not None else None
    found = from_stage(runtime, holder.coordinate, found)
    if isinstance(found, Exception):
        raise found
    return _filled(*found)


def _sent(runtime: Runtime, clean: str) -> tuple[nn.Module, dict[str, Tensor]] | EngineError:
    """What goes to other stages: the code as a module without numbers, and its parameters and buffers."""
    having = [t for t in runtime.names.stages.tables if t.modules.get(clean, "Identity") != "Identity"]
    if len(having) > 1:
        return EngineError(f"{clean!r} cannot be had whole: several stages of the pipeline have parts of it.")
    try:
        plain = _whole_here(runtime, clean)
    except EngineError as error:
        return error
    state = dict(plain.named_parameters(remove_duplicate=False)) | dict(plain.named_buffers(remove_duplicate=False))
    code = copied(plain, {id(t): t.detach().to("meta") for t in state.values()})
    return code, {name: t.detach() for name, t in state.items()}


def _filled(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    for name, tensor in state.items():
        where, _, attribute = name.rpartition(".")
        owner = module.get_submodule(where)
        if attribute in owner._buffers:
            owner._buffers[attribute] = tensor
        else:
            owner._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
    return module.eval()


def _whole_here(runtime: Runtime, clean: str) -> nn.Module:
    """The same of a module that this rank's stage has; on all ranks of the stage."""
    others = sorted(set(runtime.engines.names) - _SIMPLE)
    module = runtime.names.module_of(clean, "out")
    assert module is not None
    spread = any(e.other_lines for e in runtime.engines.found)
    if spread and any(n.endswith("experts") for n, _ in module.named_modules()):
        others.append("expert parallelism")
    if others:
        why = f"modules under {', '.join(others)} are parts"
        raise EngineError(f"{clean!r} cannot be had whole: {why}; do its work in a hook on it.")
    prefix = f"{clean}." if clean else ""
    shown = [prefix + runtime.names.strip(n) for n, _ in module.named_parameters(remove_duplicate=False)]
    known: dict[int, Any] = {
        id(b): b.full_tensor() if isinstance(b, DTensor) else b.detach().clone() for b in module.buffers()
    }
    full = {}
    for path in dict.fromkeys([*(n for n in runtime.names.parameters if n.startswith(prefix)), *shown]):
        if (of := runtime.names.clean(path, of="parameter")) in runtime.names.parameters:
            full[path.removeprefix(prefix)] = runtime.engines.full_parameter(*runtime.names.parameters[of])
            owner, attribute = runtime.names.parameters[of]
            known[id(owner.__dict__.get(attribute))] = None  # FSDP1's view of its flat parameter
    known.pop(id(None), None)
    plain, _ = plain_copy(runtime, module, known)
    for inner, tensor in full.items():
        where, _, attribute = inner.rpartition(".")
        owner = plain.get_submodule(where)
        owner.__dict__.pop(attribute, None)
        owner.register_parameter(attribute, nn.Parameter(tensor.detach(), requires_grad=False))
    return plain.eval()


def plain_copy(runtime: Runtime, module: nn.Module, known: Mapping[int, Any]) -> tuple[nn.Module, dict[int, Any]]:
    """A copy without wrappers, hooks and engines, and deepcopy's memo of it; ``known``: what is in the place of what,
    by id."""
    with stripped(module, runtime.engines, ()) as memo:
        memo.update(known)
        for part in module.modules():
            views = (v for v in part.__dict__.values() if isinstance(v, Tensor) and id(v) not in memo and not v.is_leaf)
            memo.update([(id(v), v.detach()) for v in views])  # FSDP1's of its flat parameter
        for part in reversed(list(module.modules())):  # the innermost first
            inner = next((part._modules[w] for w in WRAPPERS if w in part._modules), None)
            if inner is not None:
                memo[id(part)] = copied(inner, memo)
        return copied(module, memo), memo


def full_batch(runtime: Runtime, batch: Any) -> Any:
    """Every tensor with a batch dim, concatenated over the data axes in capture order; over those of the sequence,
    tensors as long as it on dim 1."""
    mesh = runtime.mesh
    if not any(a.kind == "data" for a in mesh.axes):
        return batch
    mesh.prepare()
    leaves = find_leaves(batch)
    length = sequence_length(batch)
    order = runtime.inference.order(leaves) if any(a.sequence for a in mesh.axes) else ""
    new = {}
    for leaf in leaves:
        if leaf.tensor.dim():
            long = leaf.tensor.dim() > 1 and leaf.tensor.shape[1] == length
            new[leaf.index] = _whole(mesh, _batch_layout(mesh, order if long else None), leaf.tensor)
    return replace_leaves(batch, new)


def _batch_layout(mesh: ModelMesh, order: Order | str | None) -> Layout:
    """Of an input: ``order`` is that of its sequence dim, None where it has none."""
    placements: list[Placement] = []
    for axis in mesh.axes:
        if not axis.sequence:
            placements.append(Shard(0) if axis.kind == "data" else Replicate())
        elif isinstance(order, str):
            raise LayoutError(
                f"the batch is in parts over {axis.name!r}, and their order is unknown: {order}.",
                page="batch-order-unknown",
            )
        else:
            placements.append(Replicate() if order is None else order(1))
    return Layout(tuple(placements), "full_batch", ragged=tuple(a.kind == "data" for a in mesh.axes))


def _whole(mesh: ModelMesh, layout: Layout, tensor: Tensor) -> Tensor:
    route = Route(mesh, layout, tensor)
    if route.own_part:
        raise LayoutError(
            f"the batch has the shape {tuple(tensor.shape)} on rank {mesh.rank} and no matching one "
            f"on other ranks; pad all batches to one length.",
            page="no-rectangle",
        )
    return route.unshard(tensor)
