"""``fold``: neighbours that are alike in everything that is shown are one line, ``layers.0-29``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from flex_model.show.outline import Node
from flex_model.show.rows import ValueRow

__all__ = ["Folded", "fold", "marks", "runs"]


@dataclass(frozen=True, slots=True)
class Folded:
    """One module, or several that are alike: ``first`` is the first of them, ``children`` are its own, folded."""

    label: str
    first: Node
    times: int
    children: tuple[Folded, ...]
    run: tuple[Node, ...] = ()

    def walk(self) -> Iterator[Folded]:
        yield self
        for child in self.children:
            yield from child.walk()

    def labels(self, name: str) -> dict[str, str]:
        """{path below module ``name``: the path with folded labels} of modules that are folded below it."""
        start, found = len(name) + 1 if name else 0, {}
        for folded in self.walk():
            if folded.times > 1:
                above = folded.first.row.name.rpartition(".")[0][start:]
                label = f"{folded.run[0].label}-{folded.run[-1].label}"
                for node in folded.run:
                    found[node.row.name[start:]] = f"{above}.{label}" if above else label
        return found


def fold(root: Node) -> Folded:
    """The tree with runs of numbered modules that are alike as one; names of lists are put before their only entry."""
    return _folded([root], marks(root))


def marks(root: Node) -> dict[int, int]:
    """{id of a node: a number, the same for nodes that are alike}."""
    numbers: dict[object, int] = {}
    of: dict[int, int] = {}
    for node in reversed([*root.walk()]):  # children first
        of[id(node)] = numbers.setdefault(_looks(node, of), len(numbers))
    return of


def _looks(node: Node, of: dict[int, int]) -> object:
    row = node.row
    return (
        row.kind,
        row.fires,
        bool(row.same_as),
        row.stages,
        tuple(replace(p, same_as="") for p in row.parameters),
        tuple(replace(v, evidence="", refusal="refused" if v.refusal else "") for v in row.values if _counts(v)),
        tuple((replace(h.row, name="", missed=""), h.plan.collective, h.plan.elements) for h in node.hooks),
        bool(node.unfired),
        tuple((child.label, of[id(child)]) for child in node.children),
    )


def _counts(value: ValueRow) -> bool:
    """Not further inputs: a cache holds more with every layer."""
    return value.side == "out" or value.index == 0


def _folded(run: Sequence[Node], of: dict[int, int]) -> Folded:
    first = run[0]
    children = tuple(_folded(one, of) for one in runs(first.children, of))
    label = first.label if len(run) == 1 else f"{first.label}-{run[-1].label}"
    if len(children) == 1 and len(run) == 1 and not (first.row.fires or first.row.parameters or first.hooks):
        only = children[0]
        return replace(only, label=f"{label}.{only.label}" if label else only.label)
    return Folded(label, first, len(run), children, tuple(run))


def runs(nodes: Sequence[Node], of: dict[int, int]) -> list[list[Node]]:
    """Neighbours that are numbered and alike together, others alone; ``of``: their ``marks``."""
    found: list[list[Node]] = []
    for node in nodes:
        last = found[-1][-1] if found else None
        follows = last is not None and last.label.isdigit() and node.label.isdigit() and of[id(last)] == of[id(node)]
        if follows:
            found[-1].append(node)
        else:
            found.append([node])
    return found
