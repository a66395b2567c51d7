"""Small helpers that need nothing of the rest."""

from __future__ import annotations

import logging

__all__ = ["setup_logger"]


def setup_logger(level: str | int = "INFO") -> logging.Logger:
    """Print this library's log messages, and nobody else's, from ``level`` upwards.

    >>> from flex_model.utils import setup_logger
    >>> setup_logger("debug").name
    'flex_model'

    Only the logger ``flex_model`` is touched; the root logger stays as the application set it up.
    """
    logger = logging.getLogger("flex_model")
    logger.setLevel(level.upper() if isinstance(level, str) else level)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s | %(name)s | %(funcName)s | %(message)s"))
        logger.addHandler(handler)
    return logger
