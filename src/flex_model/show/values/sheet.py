"""``Sheet``: a table as text, in colours and as a page; ``SheetPicture`` is what is printed and saved as one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from flex_model.errors import FlexModelError
from flex_model.result import writes
from flex_model.stills import STILLS, save_svg
from flex_model.table import as_svg, as_text

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Row", "Sheet", "SheetPicture"]

_CSS = (
    "border-collapse:collapse;color:inherit;font:13px ui-monospace,SFMono-Regular,Menlo,monospace;"
    "font-variant-numeric:tabular-nums"
)
_CELL = "padding:2px 10px;white-space:pre;text-align:"
_LEFT = ("name", "dtype", "shape", "histogram", "")


@dataclass(frozen=True, slots=True)
class Row:
    """Cells, and whether something is wrong; with ``why`` there are no cells but the name."""

    cells: tuple[str, ...]
    alert: bool = False
    why: str = ""


@dataclass(frozen=True, slots=True)
class Sheet:
    """``title`` is above the table; rows that have a ``why`` are named below it."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Row]

    @property
    def filled(self) -> list[Row]:
        return [row for row in self.rows if not row.why]

    @property
    def notes(self) -> list[tuple[str, str]]:
        """(name, why it is not in the table)."""
        return [(row.cells[0], row.why) for row in self.rows if row.why]

    def text(self) -> str:
        cells = [[self._aligned(i, c) for i, c in enumerate(row.cells)] for row in self.filled]
        parts = [self.title]
        if cells:
            parts.append(as_text([self._aligned(i, c) for i, c in enumerate(self.columns)], cells))
        return "\n".join([*parts, *(f"{name}: {why}" for name, why in self.notes)])

    def _aligned(self, column: int, cell: str) -> str:
        if self.columns[column] in _LEFT:
            return cell
        return cell.rjust(max(len(self.columns[column]), *(len(r.cells[column]) for r in self.filled)))

    def rich(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold dim")
        for column in self.columns:
            table.add_column(
                Text(column), justify="left" if column in _LEFT else "right", style=_style(column), no_wrap=True
            )
        for row in self.filled:
            table.add_row(*(Text(cell) for cell in row.cells), style="red" if row.alert else "")
        notes = [Text.assemble((name, "yellow"), f": {why}") for name, why in self.notes]
        return Group(Text(self.title, "bold"), *([table] if self.filled else []), *notes)

    def html(self) -> str:
        """A fragment that needs no style but its own."""
        head = "".join(f'<th style="{_CELL}{_side(c)};opacity:.6">{escape(c)}</th>' for c in self.columns)
        body = "".join(self._line(row) for row in self.filled)
        table = f'<table style="{_CSS}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>' if body else ""
        notes = "".join(f"<div><b>{escape(name)}</b>: {escape(why)}</div>" for name, why in self.notes)
        return f'<div style="overflow-x:auto"><div><b>{escape(self.title)}</b></div>{table}{notes}</div>'

    def _line(self, row: Row) -> str:
        pairs = zip(self.columns, row.cells, strict=True)
        cells = "".join(f'<td style="{_CELL}{_side(column)}">{escape(cell)}</td>' for column, cell in pairs)
        return f'<tr style="color:#d64545">{cells}</tr>' if row.alert else f"<tr>{cells}</tr>"

    def page(self) -> str:
        head = (
            f'<meta charset="utf-8"><meta name="color-scheme" content="light dark"><title>{escape(self.title)}</title>'
        )
        return f'<!doctype html><html lang="en"><head>{head}</head><body>{self.html()}</body></html>\n'


def _side(column: str) -> str:
    return "left" if column in _LEFT else "right"


def _style(column: str) -> str:
    return {"name": "bold", "dtype": "dim", "histogram": "cyan"}.get(column, "")


class SheetPicture(ABC):
    """Printed it is a table; in a notebook too."""

    @property
    @abstractmethod
    def sheet(self) -> Sheet:
        """What is printed."""

    @property
    @abstractmethod
    def away(self) -> str:
        """Why nothing is here; empty where something is."""

    def __str__(self) -> str:
        return self.sheet.text()

    __repr__ = __str__

    def __rich__(self) -> RenderableType:
        return self.sheet.rich()

    def _repr_html_(self) -> str:
        return self.sheet.html()

    def save(self, path: str | Path) -> Path:
        """Write the table as ``.txt``, ``.html``, or with rich as ``.svg``, and with a Chromium ``.png`` or ``.pdf``.

        All ranks may call it; the lowest writes. Where nothing was delivered, nothing is written.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix not in (".txt", ".html", *STILLS):
            raise FlexModelError(
                f"expected a path that ends in .txt, .html, {', '.join(STILLS)}, got {path.name!r}.",
                page="bad-argument",
            )
        if not writes() or self.away:
            return path
        if suffix in STILLS:
            return save_svg(self._svg(), path)
        path.write_text(f"{self}\n" if suffix == ".txt" else self.sheet.page(), encoding="utf-8")
        return path

    def _svg(self) -> str:
        lines = [line for line in str(self).splitlines() if line]
        wide = max(len(line) for line in lines[: len(self.sheet.filled) + 2])
        return as_svg(self, width=max(60, wide + 2))
