"""Tools for the case that something is wrong, and for finding that out beforehand."""

from flex_model.check.dry_run import DryRun, dry_run
from flex_model.check.examine import examine
from flex_model.check.findings import CODES, Finding
from flex_model.check.trial import Trial, try_edit

__all__ = ["CODES", "DryRun", "Finding", "Trial", "dry_run", "examine", "try_edit"]
