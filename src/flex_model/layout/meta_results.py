"""What operators make of meta tensors: of tensors of one form the same each time, so that it is asked once.

torch's meta kernels are to a large part Python, a mean takes a third of a millisecond, and a model of many equal layers
asks for the same in each. Remembered are operators of torch's own that read tensors and make new ones, by all that they
are given: values, which could make a difference, meta tensors have none.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["Results", "makes_new"]

_PLAIN = frozenset(
    {bool, int, float, complex, str, NoneType, torch.dtype, torch.device, torch.layout, torch.memory_format}
)
_BY_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_META = torch.device("meta")


class _Form(NamedTuple):
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype

    def new(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=_META)


@cache
def makes_new(func: Any) -> bool:
    """Whether an operator is torch's own and by its schema reads its arguments and makes something new of them."""
    schema = func._schema
    aliases = any(a.alias_info is not None for a in (*schema.arguments, *schema.returns))
    return func.namespace == "aten" and not aliases and not _BY_VALUES.intersection(func.tags)


class Results:
    """The forms of results, for one run."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], _Form | tuple[_Form, ...] | None] = {}

    def of(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        """``func(*args, **kwargs)``, whose tensors are all meta; ``func`` is one that ``makes_new``."""
        given = [func, torch.get_default_dtype()]  # with numbers, integers become that
        described = _describe(args, given)
        if kwargs:
            given += kwargs
            described = described and _describe(kwargs.values(), given)
        if not described:
            return func(*args, **(kwargs or {}))
        key = tuple(given)
        form = self._known.get(key)
        if form is None:
            result = func(*args, **(kwargs or {}))
            handed_on = any(one is other for one in tree_leaves(result) for other in tree_leaves((args, kwargs)))
            self._known[key] = None if handed_on else _form_of(result)
            return result
        return form.new() if type(form) is _Form else tuple([one.new() for one in form])  # type: ignore[union-attr]


def _describe(values: Iterable[Any], given: list[Any]) -> bool:
    """Adds to ``given`` all that an operator sees of ``values``; whether they are all of known types."""
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is nn.Parameter:
            given += (value.shape, value.stride(), value.dtype)
        elif kind in _PLAIN:
            given += (kind, value)  # 1, 1.0 and True are equal, and make different things
        elif kind is list or kind is tuple:
            given.append(len(value))
            if not _describe(value, given):
                return False
        else:
            return False
    return True


def _form_of(result: Any) -> _Form | tuple[_Form, ...] | None:
    """None where another result could not be made like it."""
    if isinstance(result, (tuple, list)):
        forms = [_form_of(one) if isinstance(one, Tensor) else None for one in result]
        return tuple(f for f in forms if isinstance(f, _Form)) if forms and all(forms) else None
    if type(result) is Tensor and result.is_meta and result.layout is torch.strided:
        return _Form(result.shape, result.stride(), result.dtype)
    return None
