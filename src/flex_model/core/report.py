"""What is hooked, what can be, and what it costs: small rows to print or to make a table of. Never collective."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from flex_model.core.bound import Bound
from flex_model.errors import LayoutError
from flex_model.layout.layout import Layout, shard_dim

if TYPE_CHECKING:
    from flex_model.core.runtime import Runtime

__all__ = ["HookRow", "PlanRow", "SiteRow", "hook_rows", "plan_rows", "site_rows"]


@dataclass(frozen=True, slots=True)
class HookRow:
    """One hook: ``fired`` counts values met, recomputations excluded; ``missed`` says why it never did."""

    name: str
    hook_type: str
    groups: tuple[str, ...]
    enabled: bool
    fired: int
    edits: bool
    run: str
    missed: str = ""


@dataclass(frozen=True, slots=True)
class SiteRow:
    """One place that can be hooked; ``layout`` and ``evidence`` are empty until a hook needed them.

    A module that the model holds under several names has rows for each; ``same_as`` is the first of them.
    """

    name: str
    module: str
    side: str
    index: int | None = None
    shape: tuple[int, ...] | None = None
    layout: str = ""
    evidence: str = ""
    same_as: str = ""


@dataclass(frozen=True, slots=True)
class PlanRow:
    """What a hook costs a call: the collective, the elements that move over all ranks, and why if it is refused."""

    name: str
    hook_type: str
    layout: str
    collective: str
    elements: int | None
    refusal: str = ""


def hook_rows(runtime: Runtime) -> list[HookRow]:
    rows = []
    for b in runtime.bounds:
        groups = () if b.temporary else tuple(sorted(runtime.groups.of(b.hook)))
        never = "nothing has called the model since" if b.since == runtime.calls else ""
        missed = "" if b.fired or not b.enabled else b.missed or never
        rows.append(HookRow(b.name, b.hook_type, groups, b.enabled, b.fired, b.edit is not None, b.hook.run, missed))
    return rows


def _describe(layout: Layout, runtime: Runtime) -> str:
    pairs = enumerate(zip(runtime.mesh.names, layout.placements, strict=True))
    return ", ".join(f"{n}: {'a part each' if i in layout.parted else p}" for i, (n, p) in pairs) or "whole"


def site_rows(runtime: Runtime) -> list[SiteRow]:
    known: dict[tuple[str, str], list[SiteRow]] = {}
    for form, layout in runtime.inference.known.items():
        spot = form.spot
        if spot.gradient or spot.name not in runtime.names.modules:
            continue
        kind = runtime.names.class_of(spot.name)
        if isinstance(layout, LayoutError):
            row = SiteRow(spot.name, kind, spot.side, spot.index, None, "refused", str(layout))
        else:
            row = SiteRow(
                spot.name,
                kind,
                spot.side,
                spot.index,
                layout.shape,
                _describe(layout, runtime),
                layout.evidence,
            )
        known.setdefault((spot.name, spot.side), []).append(row)
    rows = []
    for name in runtime.names.everywhere():
        first = runtime.names.others("module").get(name, "")
        for side in ("in", "out") if not runtime.names.never_fires(name) else ():
            holder = runtime.names.stages.holder(name, side)
            evidence = "" if holder is None else f"on stage {holder.stage}"
            plain = SiteRow(name, runtime.names.class_of(name), side, evidence=evidence)
            rows += [replace(r, same_as=first) for r in known.get((name, side)) or [plain]]
    return rows


def plan_rows(runtime: Runtime) -> list[PlanRow]:
    rows = []
    known = {(f.spot.name, f.spot.side): x for f, x in runtime.inference.known.items() if not f.spot.gradient}
    for bound in runtime.bounds:
        layout = known.get((bound.name, bound.side), runtime.inference.lookup_trivial())
        if isinstance(layout, LayoutError):
            rows.append(PlanRow(bound.name, bound.hook_type, "refused", "none", None, str(layout)))
        elif layout is None:
            rows.append(PlanRow(bound.name, bound.hook_type, "not yet known", "", None))
        else:
            rows.append(_cost(bound, layout, runtime))
    return rows


def _cost(bound: Bound, layout: Layout, runtime: Runtime) -> PlanRow:
    axes = [i for i in layout.moving_axes if bound.axes is None or i in bound.axes]
    if bound.edit is not None:
        axes = [i for i in axes if i not in layout.parted]
    whole = prod(layout.shape)
    shards = prod(runtime.mesh.axes[i].size for i in axes if shard_dim(layout.placements[i]) is not None)
    if not axes or (bound.edit is not None and bound.hook.run == "sharded"):
        collective, elements = "none", 0
    elif (bound.edit is not None and bound.hook.run == "every_rank") or bound.deliver == "all":
        collective, elements = "all-gather", whole // shards * (shards - 1) * shards
    elif bound.deliver == "local":
        collective, elements = "none", 0
    else:
        collective, elements = "gather to main", whole // shards * (shards - 1)
    return PlanRow(bound.name, bound.hook_type, _describe(layout, runtime), collective, elements)
