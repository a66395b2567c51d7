"""Patterns over dotted names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

__all__ = ["Pattern", "glob_to_regex"]

Pattern = str | Iterable[str] | Callable[[str], bool]


def glob_to_regex(pattern: str) -> re.Pattern[str]:
    """``*`` and ``?`` stay within one part of a dotted name, ``**`` crosses dots, ``[01]`` is a set.

    >>> bool(glob_to_regex("layers.*.mlp").fullmatch("layers.3.mlp"))
    True
    >>> bool(glob_to_regex("layers.*").fullmatch("layers.3.mlp"))
    False
    """
    out = []
    for token in re.findall(r"\*\*|\*|\?|\[[^\]]*\]|.", pattern):
        if token == "**":
            out.append(".*")
        elif token == "*":
            out.append("[^.]*")
        elif token == "?":
            out.append("[^.]")
        elif token.startswith("[") and len(token) > 1:
            out.append(token.replace("[!", "[^", 1))
        else:
            out.append(re.escape(token))
    return re.compile("".join(out))
