"""Packages that only some data need."""

from __future__ import annotations

import importlib
from typing import Any

from flex_model.errors import DataError

__all__ = ["needed"]


def needed(package: str) -> Any:
    """A module of an optional package, or an error that says what to install."""
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.partition(".")[0]
        raise DataError(f"these texts need {name}; run: pip install {name}", page="not-installed") from None
