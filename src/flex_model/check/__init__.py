"""Tools for the case that something is wrong: compare runs, stop in an edit, look at what a model runs on."""

from flex_model.check.diff import Diff, diff
from flex_model.check.parity import check
from flex_model.check.pause import breakpoint
from flex_model.check.recording import record
from flex_model.check.report import CheckFailed, Report, Row
from flex_model.check.run import Place, Run, RunError

__all__ = ["CheckFailed", "Diff", "Place", "Report", "Row", "Run", "RunError", "breakpoint", "check", "diff", "record"]
