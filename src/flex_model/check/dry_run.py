"""``dry_run``: tries every registered edit on fake tensors of the full shape and dtype that its site will have.

Shapes come from one run of the meta twin (``layout/twin.py``), a copy of the model without shards and without numbers,
at the whole batch. The model itself does not run, and ranks do not talk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flex_model.check.findings import Finding
from flex_model.check.trial import Trial, made_of, try_bound, untouched
from flex_model.core.bound import Bound
from flex_model.core.flex_model import FlexModel
from flex_model.core.hook_function import Call
from flex_model.core.runtime import Runtime
from flex_model.layout.layout import Layout
from flex_model.layout.record import Watched, double_batch
from flex_model.layout.twin import Twin, global_shapes
from flex_model.layout.values import sharding
from flex_model.trees import Leaf, as_call, find_leaves, input_leaves, resolve_index

__all__ = ["DryRun", "dry_run"]


class DryRun(list[Trial]):
    """One ``Trial`` an edit and form of its value, in the order in which they fire; printing it gives a line each."""

    @property
    def findings(self) -> list[Finding]:
        return [t.finding for t in self if t.finding is not None]

    def __str__(self) -> str:
        counts = {word: sum(t.outcome == word for t in self) for word in ("fits", "wrong", "not tried")}
        total = ", ".join(f"{n} {word}" for word, n in counts.items() if n) or "no edits"
        return "\n".join([*map(str, self), total])


class _Met(NamedTuple):
    """A value that the twin has met."""

    name: str
    side: str
    leaves: list[Leaf]


def dry_run(fm: FlexModel, inputs: Any) -> DryRun:
    """Try all enabled edits of ``fm`` for a call ``fm(*inputs)``, or ``fm(**inputs)`` of a dict, without running it.

    >>> fm = FlexModel(nn.Sequential(nn.Linear(4, 8), nn.ReLU()))
    >>> with fm.edit("1", lambda x: x[..., :4]):
    ...     print(dry_run(fm, torch.ones(2, 4)).findings[0].code)
    FM161

    ``inputs`` are what this rank would be given; no numbers of floating tensors are read. Edits that ask for numbers
    (``.item()``, ``if x.sum() > 0``) could not be tried, which the row says and which is no error. Nothing is left
    registered, and parameters, gradients, generators and ``save_ctx`` stay as they were. What an editing function does
    to other Python objects, it does.
    """
    args, kwargs = as_call(inputs)
    runtime = fm._runtime
    bounds = [b for b in runtime.bounds if b.enabled and b.edit is not None]
    refused = {id(b): why for b in bounds if (why := _cannot(runtime, b))}
    shown: dict[int, tuple[list[_Met], str]] = {}
    for grown in {_growth(runtime, b) for b in bounds if id(b) not in refused and b.side != "param"}:
        shown[grown] = _met(runtime, fm.module, args, kwargs, bounds, grown)
    rows = DryRun()
    with runtime.silent(), untouched(runtime.save_ctx):
        for bound, leaf in _in_order(runtime, bounds, refused, shown):
            rows.append(_try(runtime, bound, leaf))
    tried = {(t.name, t.hook_type) for t in rows}
    for bound in bounds:
        if (bound.name, bound.hook_type) not in tried:
            why = refused.get(id(bound)) or _why_unmet(bound, shown.get(_growth(runtime, bound)))
            rows.append(Trial(bound.name, bound.hook_type, untried=why))
    return rows


# -- what can be known -----------------------------------------------------------------------------------------
def _cannot(runtime: Runtime, bound: Bound) -> str:
    """Why the shape that an edit will meet is not to be had beforehand; "" where it is."""
    axes = runtime.mesh.axes
    if bound.module is None:
        return "its module is on another stage"
    if runtime.whole.stage_axis is not None:
        return "a stage of a pipeline is called by its schedule"
    if bound.side == "param":
        return ""
    if "FSDP1" in runtime.engines.names:
        return "FSDP1 keeps flat parameters, of which there is no copy without the other ranks"
    if any(a.sequence for a in axes):
        return "ranks share the sequence"
    if bound.source is not None and axes:
        return "its rows are tokens at experts, as many as choose them"
    if bound.axes is not None and any(a.kind == "tensor" and i not in bound.axes for i, a in enumerate(axes)):
        return f"axes={bound.hook.axes} leaves it in shards"
    return ""


def _growth(runtime: Runtime, bound: Bound) -> int:
    """How many ranks' batches its value is made of."""
    axes = enumerate(runtime.mesh.axes)
    return prod(a.size for i, a in axes if a.kind == "data" and (bound.axes is None or i in bound.axes))


def _why_unmet(bound: Bound, shown: tuple[list[_Met], str] | None) -> str:
    if bound.side == "param":
        return "the shape of the parameter is not known here"
    met, stopped = shown or ([], "")
    if any(m.name == bound.name and m.side == bound.side for m in met):
        return f"there is no tensor at unpack_idx={bound.hook.unpack_idx!r}"
    return (
        f"the run on shapes stopped before it ({stopped})" if stopped else "the module does not run with these inputs"
    )


def _met(
    runtime: Runtime, module: nn.Module, args: Any, kwargs: Any, bounds: list[Bound], grown: int
) -> tuple[list[_Met], str]:
    """The values of hooked modules at ``grown`` times this rank's batch, in the order of firing."""
    engines, roots = runtime.engines, runtime.inference.roots
    known = global_shapes(module)
    called, args, kwargs = engines.entry(module, args, kwargs)
    inside = next((m for m in called.modules() if any(m is r for r in roots)), called)
    if inside is not called or any(called is r for r in roots):
        args, kwargs = engines.stage_inputs(args, kwargs)
    dim = engines.batch_dim(inside, (args, kwargs))
    inputs = double_batch((args, kwargs), dim=dim, times=grown) if grown > 1 else (args, kwargs)
    watched = {(b.name, b.side): b.module for b in bounds if b.module is not None and b.side != "param"}
    try:
        with torch.random.fork_rng(devices=[]), runtime.silent():
            return Twin(inside, engines, known, dim).look(inputs, watched, _recording)
    except Exception as error:  # it cannot be copied
        return [], f"{type(error).__name__}: {str(error)[:200]}"


@contextmanager
def _recording(watched: Watched) -> Iterator[list[_Met]]:
    met: list[_Met] = []
    handles = []
    for (name, side), module in watched.items():

        def before(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            met.append(_Met(name, "in", input_leaves(module, args, kwargs)))

        def after(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            met.append(_Met(name, "out", find_leaves(output)))

        if side == "in":
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(after))
    try:
        yield met
    finally:
        for handle in handles:
            handle.remove()


# -- trying ----------------------------------------------------------------------------------------------------
def _in_order(
    runtime: Runtime, bounds: list[Bound], refused: Mapping[int, str], shown: Mapping[int, tuple[list[_Met], str]]
) -> Iterator[tuple[Bound, Leaf]]:
    """Hooks with what they will meet: forward, then backward, then parameters; each form of a value once."""
    seen: set[tuple[Any, ...]] = set()
    for backward in (False, True):
        for grown, (met, _) in shown.items():
            for one in reversed(met) if backward else met:
                for bound in bounds:
                    here = (bound.name, bound.side, bound.is_gradient) == (one.name, one.side, backward)
                    if not here or id(bound) in refused or _growth(runtime, bound) != grown:
                        continue
                    for leaf in resolve_index(one.leaves, bound.hook.unpack_idx):
                        form = (id(bound), leaf.index, tuple(leaf.tensor.shape), leaf.tensor.dtype)
                        if form not in seen and (leaf.tensor.is_floating_point() or not backward):
                            seen.add(form)
                            yield bound, leaf
    for bound in bounds:
        value = None if bound.side != "param" or id(bound) in refused else _parameter(runtime, bound.name)
        if value is not None:
            yield bound, Leaf(0, "", value)


def _parameter(runtime: Runtime, name: str) -> Tensor | None:
    """Something of the full shape of a parameter."""
    owner, attribute = runtime.names.parameters[name]
    parameter = owner._parameters.get(attribute)
    if parameter is None or "FSDP1" in runtime.engines.names:
        return None
    spec = sharding(parameter)
    shape = runtime.engines.full_shape(parameter) or tuple(parameter.shape if spec is None else spec.shape)
    return torch.empty(shape, dtype=parameter.dtype, device="meta")


def _try(runtime: Runtime, bound: Bound, leaf: Leaf) -> Trial:
    parameters = (p for m in (bound.module, runtime.root) if m is not None for p in m.parameters())
    device = next((p.device for p in parameters if not p.is_meta), runtime.device_of_values)
    layout = _known_layout(runtime, bound, leaf.index) if bound.hook.run == "sharded" else None
    mesh = runtime.mesh.device_mesh(device.type) if layout is not None else None
    make = made_of(tuple(leaf.tensor.shape), leaf.tensor.dtype, device, mesh, layout)
    return try_bound(bound, make, runtime.save_ctx, runtime.modules, Call(runtime.calls), leaf.index, mesh)


def _known_layout(runtime: Runtime, bound: Bound, index: int) -> Layout | None:
    """The layout of a value on the mesh, if a call has found it; groups are made by then."""
    for form, layout in runtime.inference.known.items() if runtime.mesh.axes else ():
        spot = form.spot
        if (spot.name, spot.side, spot.index, spot.gradient) == (bound.name, bound.side, index, bound.is_gradient):
            return layout if isinstance(layout, Layout) else None
    return None
