"""Labels of pictures: tokens on an axis, and short names of sites that differ by a number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from flex_model.errors import FlexModelError

__all__ = ["Tokens", "number_of", "short_names", "token_labels"]

Tokens = Tensor | Sequence[str] | Sequence[Sequence[str]] | Sequence[int] | Sequence[Sequence[int]]


def token_labels(
    tokens: Tokens | None, decode: Callable[[int], str], *, row: int, rows: int, length: int
) -> list[str] | None:
    """Of one row: ``tokens`` are ids or texts, of that row ``(S,)`` or of the whole batch ``(B, S)``.

    >>> token_labels([["a", "b"], ["c", "d"]], str, row=1, rows=2, length=2)
    ['c', 'd']
    """
    if tokens is None:
        return None
    given: list[Any] = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
    if given and not isinstance(given[0], (str, int)):
        if len(given) != rows:
            raise FlexModelError(
                f"tokens: expected those of {rows} rows, found {len(given)}; give those of the whole batch "
                f"(fm.full_batch) or of this row alone.",
                page="bad-argument",
            )
        given = list(given[row])
    if len(given) != length:
        raise FlexModelError(
            f"tokens: expected {length} of row {row}, found {len(given)}; give those that the model was called with.",
            page="bad-argument",
        )
    return [t if isinstance(t, str) else decode(int(t)) for t in given]


def short_names(names: Sequence[str]) -> tuple[list[str], str]:
    """Labels, and what they are labels of: numbers where names differ by nothing else.

    >>> short_names(["layers.0.mlp", "layers.1.mlp"])
    (['0', '1'], 'layers.*.mlp')
    >>> short_names(["embed", "layers.0"])
    (['embed', 'layers.0'], '')
    """
    fields = [name.split(".") for name in names]
    if len(names) > 1 and len({len(f) for f in fields}) == 1:
        apart = [i for i, column in enumerate(zip(*fields, strict=True)) if len(set(column)) > 1]
        if len(apart) == 1 and all(f[apart[0]].isdigit() for f in fields):
            at = apart[0]
            return [f[at] for f in fields], ".".join([*fields[0][:at], "*", *fields[0][at + 1 :]])
    return list(names), names[0] if len(names) == 1 else ""


def number_of(name: str) -> int | None:
    """The layer that a name is of: its first number.

    >>> number_of("model.layers.5.mlp"), number_of("@pattern.3.1"), number_of("lm_head")
    (5, 3, None)
    """
    return next((int(field) for field in name.split(".") if field.isdigit()), None)
