"""Patterns over dotted names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from flex_model.errors import RegistrationError

__all__ = ["Pattern", "glob_to_regex"]

_SET = r"\[(?![!^]?\])[^\]]+\]"
Pattern = str | Iterable[str] | Callable[[str], bool]


def glob_to_regex(pattern: str) -> re.Pattern[str]:
    """``*`` and ``?`` stay within one part of a dotted name, ``**`` crosses dots, ``[01]`` is a set.

    >>> bool(glob_to_regex("layers.*.mlp").fullmatch("layers.3.mlp"))
    True
    >>> bool(glob_to_regex("layers.*").fullmatch("layers.3.mlp"))
    False

    Raises RegistrationError for a set whose range runs backwards, ``[9-0]``. What is no set, ``[]``, is taken as it is.
    """
    out = []
    for token in re.findall(rf"\*\*|\*|\?|{_SET}|.", pattern):
        if token == "**":
            out.append(".*")
        elif token == "*":
            out.append("[^.]*")
        elif token == "?":
            out.append("[^.]")
        elif token.startswith("[") and len(token) > 1:
            out.append(re.sub(r"(?<!^)([\\\[&~|])", r"\\\1", token).replace("[!", "[^", 1))
        else:
            out.append(re.escape(token))
    try:
        return re.compile("".join(out))
    except re.error as error:
        raise RegistrationError(
            f"expected a pattern such as 'layers.[0-3].mlp', got {pattern!r}: {error.msg}."
        ) from None
