"""``fm.check``: is what hooks see what one process would see, do replicas agree, is everything finite?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from flex_model.check.diff import Diff, diff
from flex_model.check.measure import Statistics
from flex_model.check.recording import is_frozen, record
from flex_model.check.reference import NoReference, make_reference
from flex_model.check.replicas import parameter_rows, trainable_rows
from flex_model.check.report import Report
from flex_model.check.run import Place, Run
from flex_model.components.place import Place as At
from flex_model.core.naming.globs import Pattern
from flex_model.routing.collectives import all_gather_objects
from flex_model.trees import as_call, find_leaves

if TYPE_CHECKING:
    from flex_model.core.flex_model import FlexModel
    from flex_model.core.runtime import Runtime

__all__ = ["Loss", "Reference", "check"]

Loss = Callable[[Any], Tensor]
Reference = nn.Module | Callable[[], nn.Module] | Literal[False] | None
_REPLICAS = 1e-6  # relative to the norm; replicas are made by the same operations or by one all-reduce
_UNEQUAL = "should be the same along"  # of a refusal: replicas found unequal before they could be measured


def check(
    fm: FlexModel,
    inputs: Any,
    *,
    reference: Reference = None,
    patterns: Pattern | At = "**",
    rtol: float | None = None,
    loss: Loss | None = None,
    grad: bool = True,
) -> Report:
    """One forward and backward of the model with every site measured, and of the unsharded model where there is one.

    See ``FlexModel.check``. Collective.
    """
    report, runtime = Report(), fm._runtime
    if runtime.whole.stage_axis is not None:
        report.add(
            "parity", "not run", "", "a pipeline runs by its schedule, which check() cannot call",
            "record the schedule's step with check.record and compare runs with check.diff",
        )  # fmt: skip
        return report
    report.extend(parameter_rows(runtime))
    report.extend(trainable_rows(runtime))
    _run(report, fm, inputs, reference, patterns, rtol, loss, grad)
    report.rows = _from_main(runtime, report.rows)  # of replicas that differ each rank has its own
    return report


def _run(
    report: Report,
    fm: FlexModel,
    inputs: Any,
    reference: Reference,
    patterns: Pattern | At,
    rtol: float | None,
    loss: Loss | None,
    grad: bool,
) -> None:
    """One forward and backward, with the values of one process beside them."""
    from flex_model.core.flex_model import FlexModel

    runtime = fm._runtime
    args, kwargs = as_call(inputs)
    with _undisturbed(fm):
        with record(fm, None, patterns, grad=grad) as run:
            output = fm(*args, **kwargs)
            if grad:
                _loss_of(fm, output, loss).backward()
        _add_refused(report, run, is_frozen(fm))
        _add_finite(report, run)
        _add_replicas(report, run, runtime)
        if reference is False:
            return
        try:
            plain = make_reference(runtime, reference)
            whole = fm.full_batch((args, kwargs))
        except NoReference as error:
            report.add("parity", "not run", "", f"there is no unsharded model: {error}", "pass reference=")
            return
        theirs: Run | None = None
        problem = ""
        if plain is not None:
            try:
                theirs = _run_plain(FlexModel(plain), whole, patterns, loss, grad)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
        theirs, problem = _from_main(runtime, (theirs, problem))
    if theirs is None:
        report.add("parity", "fail", "", f"the unsharded model does not run on this batch: {problem}", "run it alone")
    elif not any(place in theirs.measured for place in run):
        report.add("parity", "not run", "", "no place was measured in both runs", "see the other rows")
    else:
        _add_parity(report, diff(theirs, run, rtol=rtol), run, grad)


def _loss_of(fm: FlexModel, output: Any, loss: Loss | None) -> Tensor:
    """The user's loss of this rank's output, or the mean square of the whole first floating tensor of the output."""
    return loss(output) if loss is not None else fm.full_output(_first(output)).float().square().mean()


def _first(output: Any) -> Tensor:
    return next(leaf.tensor for leaf in find_leaves(output) if leaf.tensor.is_floating_point())


@contextmanager
def _undisturbed(fm: FlexModel) -> Iterator[None]:
    """Eval mode, no dropout; modes, gradients and random state are put back."""
    modes = [(m, m.training) for m in fm.modules()]
    grads = [(p, p.grad) for p in fm.parameters()]
    devices = [d.index for d in fm._runtime.gpus if d.index is not None]
    fm.eval()
    for parameter, _ in grads:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            yield
    finally:
        for parameter, grad in grads:
            parameter.grad = grad
        for module, training in modes:
            module.training = training


def _run_plain(fm: FlexModel, batch: Any, patterns: Pattern | At, loss: Loss | None, grad: bool) -> Run:
    fm.eval()
    args, kwargs = batch
    with record(fm, None, patterns, grad=grad) as run:
        output = fm(*args, **kwargs)
        if grad:
            _loss_of(fm, output, loss).backward()
    fm.restore()
    return run


def _from_main(runtime: Runtime, value: Any) -> Any:
    """What the main rank has, on all."""
    if not runtime.whole.axes:
        return value
    everyone = all_gather_objects(value if runtime.whole.is_main else None, runtime.whole.world)
    return next(v for v in everyone if v is not None)


# -- rows ------------------------------------------------------------------------------------------------------
def _add_refused(report: Report, run: Run, frozen: bool) -> None:
    for place, why in run.refused.items():
        short = why.partition(" is unknown: ")[2].partition(" If you know how")[0] or why
        artificial = frozen and why.startswith("gradient of")  # only the record asks for it, and it may be in parts
        if _UNEQUAL in why and not artificial:
            report.add("replicas equal", "fail", place, short, "compare what comes before it, rank by rank")
        else:
            report.add("layouts", "refused", place, short, "if you know how it lies: HookFunction(layout=)")


def _add_finite(report: Report, run: Run) -> None:
    bad = [(p, s) for p, s in run.measured.items() if not s.finite]
    for place, s in bad:
        report.add("finite", "fail", str(place), f"{s.nan} nan and {s.inf} inf of shape {list(s.shape)}", _cause(place))
    if not bad:
        report.add("finite", "ok", "", f"{len(run)} values and gradients")


def _cause(place: Place) -> str:
    return "look where it begins, at the first row" if place.what == "value" else "look at the forward first"


def _where_to_look(place: Place) -> str:
    if place.what == "value":
        return "look where it begins, at the first row: at its weights, and at what it does on one rank alone"
    return "if values are the same: look at the backward behind the first row"


def _add_replicas(report: Report, run: Run, runtime: Runtime) -> None:
    apart = [(p, _worst(s)) for p, s in run.measured.items() if s.spread and not _worst(s)[1] <= _REPLICAS]
    for place, (axis, far) in apart:
        report.add(
            "replicas equal", "fail", str(place), f"ranks along {axis!r} differ by {far:.1e} of its norm",
            "look where it begins, at the first row: at its parameters and inputs, rank by rank",
        )  # fmt: skip
    count = sum(bool(s.spread) for s in run.measured.values())
    if not apart and not report.of("replicas equal"):
        found = f"{count} values and gradients" if runtime.whole.axes else "one process"
        report.add("replicas equal", "ok", "", found)


def _worst(s: Statistics) -> tuple[str, float]:
    axis = max(s.spread, key=lambda a: s.spread[a] if s.spread[a] == s.spread[a] else float("inf"))
    return axis, s.spread[axis]


def _add_parity(report: Report, found: Diff, run: Run, grad: bool) -> None:
    for check_name, values in (("parity", True), ("gradient parity", False)):
        rows = [r for r in found.rows if (r.place.what == "value") is values]
        bad = [r for r in rows if not r.same]
        for row in bad:
            report.add(
                check_name, "fail", str(row.place), row.why + f" (norm {row.b.norm:.6g}, unsharded {row.a.norm:.6g})",
                _where_to_look(row.place),
            )  # fmt: skip
        if rows and not bad:
            worst = max(r.error for r in rows)
            report.add(check_name, "ok", "", f"{len(rows)} places, at most {worst:.1e} off")
        elif not rows and (values or grad):
            report.add(check_name, "not run", "", "no place was measured in both runs", "see the other rows")
    told = {place.split(",")[0] for place in run.refused}
    for place in (*found.only_a, *found.only_b):
        if place.split(",")[0] not in told:
            which = "unsharded" if place in found.only_a else "sharded"
            report.add("parity", "fail", place, f"only the {which} model has it", "do both run the same code?")
