"""``Outline``: a model as a tree of modules, with what is in them, what passes them and what hooks them.

It is data, which the pictures draw: a tree in a terminal (``tree.py``), a page (``page/``).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from flex_model.core.report import HookRow, PlanRow, SiteRow, hook_rows, plan_rows, site_rows
from flex_model.routing.collectives import all_gather_objects
from flex_model.show.flow import Flow
from flex_model.show.observe import Seen
from flex_model.show.rows import ModuleRow, ParameterRow, ValueRow, module_rows

if TYPE_CHECKING:
    from flex_model.core.runtime import Runtime

__all__ = ["AxisRow", "Hooked", "Node", "Outline", "outline", "over_stages"]


@dataclass(frozen=True, slots=True)
class AxisRow:
    """An axis of the mesh: ``kind`` is data, sequence, tensor or stage."""

    name: str
    size: int
    kind: str


@dataclass(frozen=True, slots=True)
class Hooked:
    """A hook, and what it costs a call."""

    row: HookRow
    plan: PlanRow


@dataclass(slots=True)
class Node:
    """A module. ``size``: parameters of it and of all below, whole and each once; ``here``: of these on this rank."""

    row: ModuleRow
    label: str
    children: list[Node] = field(default_factory=list)
    hooks: list[Hooked] = field(default_factory=list)
    unfired: str = ""
    size: int = 0
    here: int = 0

    def walk(self) -> Iterator[Node]:
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True)
class Outline:
    """``ranks``: of the mesh, nested lists, one level an axis. ``observed``: whether a forward was looked at."""

    root: Node
    axes: tuple[AxisRow, ...]
    ranks: Any
    rank: int
    engines: tuple[str, ...]
    groups: tuple[str, ...]
    observed: bool
    flows: Mapping[str, Flow] = field(default_factory=dict)
    places: Mapping[int, int] = field(default_factory=dict)  # {stage: where along the stage axis}

    @cached_property
    def diagrams(self) -> dict[str, str]:
        """{module: how values flow between those that it calls, as SVG}, of the first of modules that are alike."""
        from flex_model.show.diagram import diagrams
        from flex_model.show.fold import fold

        flows: dict[str, Flow] = {}
        for folded in fold(self.root).walk():
            name = folded.first.row.name
            if name in self.flows:
                flows[name] = self.flows[name].merged(folded.labels(name))
        return diagrams(flows)


def outline(runtime: Runtime, seen: Seen | None, *, together: bool = False) -> Outline:
    """The model as it is known: ``together``, with the parameters of a pipeline's other stages, which is collective."""
    rows = module_rows(runtime)
    if together:
        _complete(runtime, rows)
    for (name, _), values in (seen.values if seen else _known(runtime)).items():
        rows[name].values += values
    hooks: dict[str, list[Hooked]] = {}
    for row, plan in zip(hook_rows(runtime), plan_rows(runtime), strict=True):
        owner = row.name if row.name in rows else row.name.rpartition(".")[0]
        hooks.setdefault(owner, []).append(Hooked(row, plan))
    whole, root = runtime.whole, _tree(rows, hooks, seen.unfired if seen else {})
    kinds = ("sequence" if a.sequence else a.kind for a in whole.axes)
    return Outline(
        root,
        tuple(AxisRow(a.name, a.size, kind) for a, kind in zip(whole.axes, kinds, strict=True)),
        whole.grid.tolist() if whole.axes else 0,
        whole.rank,
        tuple(runtime.engines.names),
        tuple(runtime.groups.names),
        seen is not None,
        seen.flows if seen else {},
        {table.stage: table.coordinate for table in runtime.names.stages.tables},
    )


def _complete(runtime: Runtime, rows: dict[str, ModuleRow]) -> None:
    """Parameters of other stages' modules, from those."""
    axis = runtime.whole.stage_axis
    if axis is None:
        return
    with runtime.watch.at("the parameters of all stages"):
        mine = {name: row.parameters for name, row in rows.items() if row.parameters}
        told: list[dict[str, list[ParameterRow]]] = all_gather_objects(mine, runtime.whole.group(axis))
    for name, theirs in (pair for parameters in told for pair in parameters.items()):
        if not rows[name].parameters:
            rows[name].parameters = [replace(p, local=None) for p in theirs]


def over_stages(whole: Outline, held: Sequence[Collection[str]]) -> Outline:
    """An outline of the plain model as the first rank of a pipeline has it. ``held``: names of each stage's modules."""
    for node in whole.root.walk():
        row = node.row
        row.stages = tuple(stage for stage, names in enumerate(held) if row.name in names)
        if 0 not in row.stages:
            row.parameters = [replace(p, local=None) for p in row.parameters]
    _count(whole.root)
    return whole


def _known(runtime: Runtime) -> dict[tuple[str, str], list[ValueRow]]:
    """From the layouts that hooks have needed so far."""
    found: dict[tuple[str, str], list[ValueRow]] = {}
    for row in site_rows(runtime):
        if row.shape and not row.same_as:
            found.setdefault((row.name, row.side), []).append(_value(row))
    return found


def _value(row: SiteRow) -> ValueRow:
    placed = tuple(part.partition(": ")[2] for part in re.split(r", (?=[^,]*: )", row.layout))
    return ValueRow(row.side, row.index or 0, row.shape, (), "", placed, row.evidence)


def _tree(rows: dict[str, ModuleRow], hooks: dict[str, list[Hooked]], unfired: dict[str, str]) -> Node:
    nodes: dict[str, Node] = {}
    for name, row in rows.items():
        nodes[name] = Node(row, name.rpartition(".")[2], [], hooks.get(name, []), unfired.get(name, ""))
    root = nodes[""]
    for name, node in nodes.items():
        if name:
            _parent(nodes, name).children.append(node)
    _count(root)
    return root


def _parent(nodes: dict[str, Node], name: str) -> Node:
    above = name.rpartition(".")[0]
    while above not in nodes:
        above = above.rpartition(".")[0]
    return nodes[above]


def _count(root: Node) -> None:
    for node in reversed([*root.walk()]):  # children first
        own = [p for p in node.row.parameters if not p.same_as]
        below: Iterable[Node] = [child for child in node.children if not child.row.same_as]
        node.size = sum(p.size for p in own) + sum(child.size for child in below)
        node.here = sum(p.size_here for p in own) + sum(child.here for child in below)
