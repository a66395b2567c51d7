"""``Report``: what was looked at, what was found, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from flex_model.errors import FlexModelError
from flex_model.table import as_text, show

__all__ = ["CheckFailed", "Report", "Row", "Status"]

Status = Literal["ok", "fail", "refused", "not run"]
_MOST = 3
_COLUMNS = ("status", "check", "where", "what was found", "what to do")


class CheckFailed(FlexModelError, AssertionError):
    """A check found something wrong, or could not be made; the report is in the message."""

    page = "check-failed"


@dataclass(frozen=True, slots=True)
class Row:
    """One finding. "refused": a value has no whole, so nothing can be said of it. "not run": ``found`` says why."""

    check: str
    status: Status
    where: str = ""
    found: str = ""
    advice: str = ""


@dataclass(slots=True)
class Report:
    """All findings, the first divergence of each check first."""

    rows: list[Row] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing failed, and every check that was asked for was made."""
        return all(row.status in ("ok", "refused") for row in self.rows)

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row.status in ("fail", "not run")]

    def of(self, check: str) -> list[Row]:
        """The rows of one check."""
        return [row for row in self.rows if row.check == check]

    def add(self, check: str, status: Status, where: str = "", found: str = "", advice: str = "") -> None:
        self.rows.append(Row(check, status, where, found, advice))

    def extend(self, rows: Sequence[Row]) -> None:
        self.rows += rows

    def raise_if_failed(self) -> Report:
        """The report itself if it is ok; CheckFailed with the rows that are not, if it is not."""
        if not self.ok:
            raise CheckFailed("the check failed:\n" + as_text(_COLUMNS, _cells(self.failed)))
        return self

    def as_dicts(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.rows]

    def show(self, title: str = "") -> None:
        """Print the first rows of each check, with rich where it is installed."""
        show(_COLUMNS, _cells(self.rows), title=title)

    def __str__(self) -> str:
        return as_text(_COLUMNS, _cells(self.rows))


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    """At most ``_MOST`` rows a check and status, and each advice once: the first are what matters."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.check, row.status), []).append(row)
    cells = []
    for (name, status), found in groups.items():
        for row, before in zip(found[:_MOST], [None, *found], strict=False):
            advice = "" if before is not None and before.advice == row.advice else row.advice
            cells.append([row.status, row.check, row.where, row.found, advice])
        if len(found) > _MOST:
            cells.append([status, name, f"and {len(found) - _MOST} more", "", ""])
    return cells
