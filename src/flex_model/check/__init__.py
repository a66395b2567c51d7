"""Checks that say beforehand what would go wrong."""

from flex_model.check.examine import examine
from flex_model.check.findings import CODES, Finding

__all__ = ["CODES", "Finding", "examine"]
