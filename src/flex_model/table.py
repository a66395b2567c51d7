"""Rows as text: a table of rich's on a terminal that has it, aligned columns anywhere."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from flex_model.errors import FlexModelError

__all__ = ["as_svg", "as_text", "show"]

_STYLES = {"ok": "green", "fail": "bold red", "refused": "yellow", "not run": "yellow"}


def as_text(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces; the last one is as long as it is.

    >>> print(as_text(["a", "b"], [["one", "1"], ["three", "3"]]))
    a      b
    one    1
    three  3
    """
    lines = [list(columns), *(list(r) for r in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def show(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> None:
    """Print the rows."""
    if find_spec("rich") is None or not sys.stdout.isatty():
        print(as_text(columns, rows) if not title else f"{title}\n{as_text(columns, rows)}")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, title=title or None, title_justify="left")
    for row in rows:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    Console().print(table)


def as_svg(renderable: Any, *, width: int, title: str = "") -> str:
    """What rich prints as a picture, ``width`` characters wide."""
    from io import StringIO

    try:
        from rich.console import Console
    except ImportError:
        raise FlexModelError(
            "a .svg of a table needs rich; install flex-model[cli], or save as .txt.", page="not-installed"
        ) from None

    console = Console(record=True, file=StringIO(), width=width)
    console.print(renderable)
    console.print()  # or what hangs below the last line is cut off
    svg = console.export_svg(title=title)
    return re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # which would be asked of a server somewhere
