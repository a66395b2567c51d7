"""Tools for the case that something is wrong, and for finding that out beforehand: read and try editing functions,
compare runs, stop in an edit, look at what a model runs on."""

from flex_model.check.diff import Diff, diff
from flex_model.check.dry_run import DryRun, dry_run
from flex_model.check.examine import examine
from flex_model.check.findings import CODES, Finding
from flex_model.check.parity import check
from flex_model.check.pause import breakpoint
from flex_model.check.recording import record
from flex_model.check.report import CheckFailed, Report, Row
from flex_model.check.run import Place, Run, RunError
from flex_model.check.trial import Trial, try_edit

__all__ = [
    "CODES",
    "CheckFailed",
    "Diff",
    "DryRun",
    "Finding",
    "Place",
    "Report",
    "Row",
    "Run",
    "RunError",
    "Trial",
    "breakpoint",
    "check",
    "diff",
    "dry_run",
    "examine",
    "record",
    "try_edit",
]
