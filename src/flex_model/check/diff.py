"""``diff``: where two runs part, module by module in the order in which they ran."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite, sqrt
from pathlib import Path

from flex_model.check.measure import PROJECTIONS, Statistics
from flex_model.check.recording import of_captured
from flex_model.check.run import Place, Run, RunError
from flex_model.core.captured import Captured
from flex_model.table import as_text

__all__ = ["Diff", "DiffRow", "diff", "tolerance_of"]

_TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}


@dataclass(frozen=True, slots=True)
class DiffRow:
    """One place in both runs: ``error`` is about the norm of the difference, relative to the larger norm."""

    place: Place
    a: Statistics
    b: Statistics
    error: float
    tolerance: float
    why: str = ""

    @property
    def same(self) -> bool:
        return not self.why


@dataclass(frozen=True, slots=True)
class Diff:
    """All places that two runs share, and those of one alone. ``first`` is the first value that differs in the order
    of the forward, ``first_gradient`` the first gradient in that of the backward."""

    rows: list[DiffRow]
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)

    @property
    def first(self) -> DiffRow | None:
        return next((r for r in self.rows if not r.same and r.place.what == "value"), None)

    @property
    def first_gradient(self) -> DiffRow | None:
        return next((r for r in self.rows if not r.same and r.place.what != "value"), None)

    @property
    def same(self) -> bool:
        """Whether the runs have the same places, and no place differs."""
        return bool(self.rows) and all(r.same for r in self.rows) and not self.only_a and not self.only_b

    def __str__(self) -> str:
        return f"{self.summary()}\n{self.table()}"

    def summary(self) -> str:
        """What differs first, in a few lines."""
        bad = sum(not r.same for r in self.rows)
        lines = [f"{len(self.rows) - bad} of {len(self.rows)} places are the same."]
        for row, when in ((self.first, "forward"), (self.first_gradient, "backward")):
            if row is not None:
                lines.append(f"First to differ in the {when}: {row.place} ({row.why}).")
        for label, only in (("first", self.only_a), ("second", self.only_b)):
            if only:
                rest = f" and {len(only) - 5} more" if len(only) > 5 else ""
                lines.append(f"Only in the {label} run: {'; '.join(only[:5])}{rest}.")
        return "\n".join(lines)

    def table(self, most: int = 40) -> str:
        """The statistics of both runs side by side, from the first place that differs on."""
        start = next((i for i, r in enumerate(self.rows) if not r.same), 0)
        rows = self.rows[max(0, start - 2) :][:most]
        columns = ["", "place", "shape", "error", "norm", "", "mean", "", "std", "", "nan", ""]
        cells = [
            ["" if r.same else "*", str(r.place), str(list(r.a.shape)), f"{r.error:.1e}",
             *(f"{x:.5g}" for pair in ((r.a.norm, r.b.norm), (r.a.mean, r.b.mean), (r.a.std, r.b.std)) for x in pair),
             str(r.a.nan), str(r.b.nan)]
            for r in rows
        ]  # fmt: skip
        return as_text(columns, cells)


def diff(
    a: Run | Captured | str | Path,
    b: Run | Captured | str | Path,
    *,
    rtol: float | None = None,
    atol: float = 1e-12,
) -> Diff:
    """Compare two runs, saved runs or captures, place by place.

    ``rtol``: how far a tensor may be off, relative to its norm (default: 1e-5 in float32, by the coarser dtype of the
    two). A difference in the norm below ``atol`` counts as none. Collective where a capture holds DTensors.
    """
    a, b = _run(a), _run(b)
    shared = [p for p in a if p in b.measured]
    if not shared:
        raise RunError(f"the runs have no place in common ({len(a)} and {len(b)} places); record the same modules.")
    rows = [_compared(place, a[place], b[place], rtol, atol) for place in shared]
    only_a = [str(p) for p in a if p not in b.measured]
    only_b = [str(p) for p in b if p not in a.measured]
    return Diff(rows, only_a, only_b)


def _run(given: Run | Captured | str | Path) -> Run:
    if isinstance(given, Run):
        return given
    return of_captured(given) if isinstance(given, Captured) else Run.load(given)


def tolerance_of(*dtypes: str) -> float:
    """How far tensors of these dtypes may be apart, relative to their norm: that of the coarsest."""
    return max(_TOLERANCE.get(d, 0.0) for d in dtypes)


def _compared(place: Place, a: Statistics, b: Statistics, rtol: float | None, atol: float) -> DiffRow:
    tolerance = tolerance_of(a.dtype, b.dtype) if rtol is None else rtol
    scale = max(a.norm, b.norm)
    apart = sqrt(sum((x - y) ** 2 for x, y in zip(a.projections, b.projections, strict=True)) / PROJECTIONS)
    error = apart / scale if scale else apart
    why = ""
    if a.shape != b.shape:
        why = f"shapes {list(a.shape)} and {list(b.shape)}"
    elif (a.nan, a.inf) != (b.nan, b.inf):
        why = f"nan {a.nan} and {b.nan}, inf {a.inf} and {b.inf}"
    elif not isfinite(error) or (apart > atol and error > tolerance):
        why = f"off by {error:.1e} of its norm, {tolerance:.0e} allowed"
    return DiffRow(place, a, b, error, tolerance, why)
