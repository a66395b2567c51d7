"""Tools for the case that something is wrong: compare runs, stop in an edit, look at what a model runs on."""

from flex_model.check.diff import Diff, diff
from flex_model.check.recording import record
from flex_model.check.run import Place, Run, RunError

__all__ = ["Diff", "Place", "Run", "RunError", "diff", "record"]
