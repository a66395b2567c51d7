"""``record``: the statistics of every site of a run, without moving a value."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flex_model.check.measure import Statistics, measure
from flex_model.check.run import Place, Run, What
from flex_model.components.place import Place as At
from flex_model.core.asked import modules_of
from flex_model.core.captured import Captured
from flex_model.core.hook_function import Site
from flex_model.core.naming.globs import Pattern
from flex_model.errors import MissedHookWarning
from flex_model.routing.collectives import all_gather_objects

if TYPE_CHECKING:
    from flex_model.core.flex_model import FlexModel
    from flex_model.core.runtime import Runtime

__all__ = ["is_frozen", "of_captured", "record"]

_AFTER: What = "gradient of the output"
_BEFORE: What = "gradient of the input"
Events = dict[tuple[str, str], None]  # (side, name) in the order of the forward


@contextmanager
def record(
    fm: FlexModel,
    path: str | Path | None = None,
    patterns: Pattern | At = "**",
    *,
    grad: bool = True,
    note: str = "",
) -> Iterator[Run]:
    """Statistics of every module's output in the block, and after a backward of the gradients of outputs and inputs.

    >>> with record(fm, "runs/tp2") as run:              # doctest: +SKIP
    ...     fm(batch).pow(2).mean().backward()
    >>> print(diff("runs/one_process", run))             # doctest: +SKIP

    The run is filled when the block ends, alike on all ranks, and then written by the lowest one. Values stay where
    they are: each rank measures its own shards, and what is added up is some 70 numbers a value. All ranks enter and
    leave the block.
    """
    run, patterns = Run(about=_about(fm, note)), modules_of(patterns)
    events: Events = {}
    grad = grad and not (fm._runtime.whole.stage_axis is not None and fm._runtime.engines.no_backward)
    # On a model that trains, gradients that exist without us: others, on ranks that share a frozen value, are in parts.
    frozen = grad and is_frozen(fm)
    with ExitStack() as stack:
        enter = stack.enter_context
        outputs = enter(fm.capture(patterns, unpack_idx="all", deliver="local", grad=frozen))
        after = before = None
        if grad:
            before = enter(fm.capture(patterns, hook_type="full_backward", unpack_idx="all", deliver="local"))
        if grad and not frozen:
            after = enter(fm.capture(patterns, hook_type="full_backward_pre", unpack_idx="all", deliver="local"))
        enter(_watched(fm._runtime, events))
        yield run
        with warnings.catch_warnings():  # of all modules, some have no value or no gradient
            warnings.simplefilter("ignore", MissedHookWarning)
            stack.close()
    found = _ordered(events, outputs, after, before)
    measured = dict(zip(found, measure(list(found.values())), strict=True))
    refused = _refused(outputs, "value") | _refused(after, _AFTER) | _refused(before, _BEFORE)
    _fill(fm._runtime, run, measured, refused)
    if path is not None and (not fm._runtime.whole.axes or fm._runtime.whole.is_main):
        run.save(path)


def of_captured(acts: Captured) -> Run:
    """What was captured as a run: values in the order in which they came, and so gradients. Collective for DTensors."""
    found = _ordered({}, acts)
    measured = measure(list(found.values()))
    return Run(dict(zip(found, measured, strict=True)), _refused(acts, "value"))


def is_frozen(fm: FlexModel) -> bool:
    """Whether no parameter gets a gradient, so that a backward has only those that hooks ask for."""
    return fm._runtime.whole.stage_axis is None and not any(p.requires_grad for p in fm.module.parameters())


# -- the order of things ---------------------------------------------------------------------------------------
@contextmanager
def _watched(runtime: Runtime, events: Events) -> Iterator[None]:
    """Note the order in which modules are entered and left, the first time each."""
    outside = torch.compiler.disable if runtime.names.compiled else _as_it_is
    handles = []
    try:
        for name, module in runtime.names.modules.items():
            enter, leave = outside(partial(_note, events, "in", name)), outside(partial(_note, events, "out", name))
            handles.append(module.register_forward_pre_hook(enter, prepend=True))
            handles.append(module.register_forward_hook(leave))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _as_it_is(hook: Callable[..., None]) -> Callable[..., None]:
    return hook


def _note(events: Events, side: str, name: str, *_: object) -> None:
    events.setdefault((side, name))


def _ordered(
    events: Events, outputs: Captured, of_outputs: Captured | None = None, of_inputs: Captured | None = None
) -> dict[Place, Tensor]:
    """Values in the order of the forward, then gradients in that of the backward; parts of no whole are left out."""
    values = _listed(outputs._values.values, "value")
    after = _listed(outputs._grads.values, _AFTER)
    after |= {} if of_outputs is None else _listed(of_outputs._values.values, _AFTER)
    before = {} if of_inputs is None else _listed(of_inputs._values.values, _BEFORE)
    if not events:
        return values | after | before
    when = {event: i for i, event in enumerate(events)}
    last = len(when)
    forward = sorted(values, key=lambda p: when.get(("out", p.name), last))
    side = {_AFTER: "out", _BEFORE: "in"}
    backward = sorted(after | before, key=lambda p: -when.get((side[p.what], p.name), last))
    everything = values | after | before
    return {place: everything[place] for place in (*forward, *backward)}


def _listed(table: dict[str | Site, list[Any]], what: What) -> dict[Place, Tensor]:
    found = {}
    for key, calls in table.items():
        name, index = (key, 0) if isinstance(key, str) else (key.name, int(key.index))
        for call, value in enumerate(calls):
            if isinstance(value, Tensor):
                found[Place(name, what, index, call)] = value
    return found


def _refused(acts: Captured | None, what: What) -> dict[str, str]:
    """Why places of a capture have no statistics."""
    if acts is None:
        return {}
    found = {}
    for key, error in acts.refused.items():
        of_gradient = what == "value" and str(error).startswith("gradient of")
        found[str(_place(key, _AFTER if of_gradient else what))] = str(error)
    tables: list[tuple[What, Any]] = [(what, acts._values.values), (_AFTER, acts._grads.values)]
    for kind, table in tables:
        for key, calls in table.items():
            if not all(isinstance(v, Tensor) for v in calls):
                found[str(_place(key, kind))] = (
                    "it comes in parts that no DTensor holds (of unequal size, or rows at experts), and is not measured"
                )
    return found


def _place(key: str | Site, what: Any) -> Place:
    return Place(key, what) if isinstance(key, str) else Place(key.name, what, int(key.index))


# -- the run ---------------------------------------------------------------------------------------------------
def _fill(runtime: Runtime, run: Run, measured: dict[Place, Statistics], refused: dict[str, str]) -> None:
    """Of a pipeline, what all stages measured: values in the order of stages, gradients the other way."""
    axis = runtime.whole.stage_axis
    if axis is not None:
        everyone = all_gather_objects((measured, refused), runtime.whole.group(axis))
        measured = {p: s for theirs, _ in everyone for p, s in theirs.items() if p.what == "value"}
        measured |= {p: s for theirs, _ in reversed(everyone) for p, s in theirs.items() if p.what != "value"}
        refused = {place: why for _, theirs in everyone for place, why in theirs.items()}
    run.measured.update(measured)
    run.refused.update(refused)


def _about(fm: FlexModel, note: str) -> dict[str, str]:
    runtime = fm._runtime
    return {
        "note": note,
        "model": type(runtime.root).__name__,
        "engines": ", ".join(runtime.engines.names) or "none",
        "mesh": ", ".join(f"{a.name}={a.size}" for a in runtime.whole.axes) or "one process",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
