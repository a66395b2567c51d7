"""The outline as a tree of lines, repeated blocks folded: plain text anywhere, in colours on a terminal with rich."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flex_model.show.fold import Folded, fold
from flex_model.show.outline import Hooked, Node, Outline
from flex_model.show.rows import ValueRow
from flex_model.table import as_text

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["amount", "headline", "plain", "rich_tree"]

_COLUMNS = ("module", "class", "parameters", "output", "here", "layout", "stage", "hooks")
_STYLES = {
    "class": "dim",
    "parameters": "cyan",
    "here": "yellow",
    "layout": "yellow",
    "stage": "blue",
    "hooks": "green",
}


@dataclass(frozen=True, slots=True)
class Line:
    """Cells by column; ``guide``: the branches before the module's name."""

    guide: str
    cells: dict[str, str]
    alert: bool = False


def amount(number: float) -> str:
    """A count in few characters.

    >>> [amount(n) for n in (0, 999, 1234, 134_515_008)]
    ['0', '999', '1.23k', '135M']
    """
    units = iter(("", "k", "M", "B", "T"))
    unit = next(units)
    while abs(number) >= 999.5 and unit != "T":
        number, unit = number / 1000, next(units)
    return f"{number:.3g}{unit}"


def headline(outline: Outline) -> str:
    """What the model is and over which ranks it is spread, in a line."""
    root = outline.root
    words = [f"{root.row.kind}: {amount(root.size)} parameters"]
    if outline.axes:
        ranks = 1
        for axis in outline.axes:
            ranks *= axis.size
        mesh = " x ".join(f"{axis.name} {axis.size}" for axis in outline.axes)
        words.append(f"{amount(root.here)} on rank {outline.rank} of {ranks} ({mesh})")
        words.append(", ".join(outline.engines))
    if not outline.observed:
        words.append("shapes as far as hooks have met them; fm.show(inputs) finds all")
    return "; ".join(words)


def plain(outline: Outline, depth: int | None = None) -> str:
    """The tree as text. ``depth``: of how many levels."""
    lines = [*_lines(outline, depth)]
    columns = _used(outline, lines)
    rows = [[line.guide + line.cells["module"], *(line.cells.get(c, "") for c in columns[1:])] for line in lines]
    return f"{headline(outline)}\n{as_text(columns, rows)}"


def rich_tree(outline: Outline, depth: int | None = None) -> RenderableType:
    """The tree for ``rich.print``."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    lines = [*_lines(outline, depth)]
    columns = _used(outline, lines)
    table = Table(*columns, box=None, pad_edge=False, header_style="bold dim")
    for column in table.columns:
        column.no_wrap = column.header == "module"
    for line in lines:
        name = Text.assemble((line.guide, "dim"), (line.cells["module"], "bold"))
        cells: list[Any] = [Text(line.cells.get(c, ""), style=_STYLES.get(c, "")) for c in columns[1:]]
        table.add_row(name, *cells, style="red" if line.alert else "")
    return Group(Text(headline(outline)), table)


def _used(outline: Outline, lines: list[Line]) -> list[str]:
    return [c for c in _COLUMNS if c == "module" or any(line.cells.get(c) for line in lines)]


def _lines(outline: Outline, depth: int | None) -> Iterator[Line]:
    root, axes = fold(outline.root), [a.name for a in outline.axes if a.kind != "stage"]
    yield _line(root, "", depth == 0, axes)
    yield from _below(root, "", 1, depth, axes)


def _below(folded: Folded, guide: str, level: int, depth: int | None, axes: Sequence[str]) -> Iterator[Line]:
    if depth is not None and level > depth:
        return
    for child in folded.children:
        last = child is folded.children[-1]
        yield _line(child, guide + ("└─ " if last else "├─ "), level == depth, axes)
        yield from _below(child, guide + ("   " if last else "│  "), level + 1, depth, axes)


def _line(folded: Folded, guide: str, cut: bool, axes: Sequence[str]) -> Line:
    node = folded.first
    out = [v for v in node.row.values if v.side == "out"]
    first = out[0] if out else None
    label = folded.label or "(model)"
    cells = {
        "module": label
        + (f" x{folded.times}" if folded.times > 1 else "")
        + (" ..." if cut and folded.children else ""),
        "class": node.row.kind,
        "parameters": _parameters(node, folded.times),
        "output": _output(node, first, len(out)),
        "here": _here(first),
        "layout": _layout(first, axes),
        "stage": ", ".join(map(str, node.row.stages)),
        "hooks": ", ".join(map(_hook, node.hooks)),
    }
    return Line(guide, cells, alert=first is not None and bool(first.refusal))


def _parameters(node: Node, times: int) -> str:
    if node.row.same_as:
        return f"as {node.row.same_as}"
    tied = [p.same_as for p in node.row.parameters if p.same_as]
    if not node.size:
        return f"as {tied[0]}" if tied else ""
    return amount(node.size) + (" each" if times > 1 else "")


def _output(node: Node, first: ValueRow | None, several: int) -> str:
    if first is None:
        return "did not run" if node.unfired else ""
    if first.refusal:
        return "refused"
    shape = "" if first.shape is None else str(first.shape)
    ran = f", runs {first.times} times" if first.times > 1 else ""
    more = f", and {several - 1} more" if several > 1 else ""
    return f"{shape} {first.dtype}".strip() + more + ran


def _here(value: ValueRow | None) -> str:
    same = value is None or value.refusal or not value.local or value.local == value.shape
    return "" if same or value is None else str(value.local)


def _layout(value: ValueRow | None, axes: Sequence[str]) -> str:
    if value is None or value.refusal:
        return ""
    named = zip(axes, value.placements, strict=False)
    return ", ".join(f"{axis}: {word}" for axis, word in named if word not in ("R", "whole"))


def _hook(hooked: Hooked) -> str:
    row = hooked.row
    groups = [group for group in row.groups if group != "all"]
    words = [row.hook_type, "edit" if row.edits else "", f"[{', '.join(groups)}]" if groups else ""]
    return ("● " if row.enabled else "○ ") + " ".join(word for word in words if word)
