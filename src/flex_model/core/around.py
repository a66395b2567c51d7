"""What ``fm.capture`` and ``fm.edit`` return: a block of code, or with ``run`` one call of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from flex_model.core.captured import Captured
from flex_model.core.hook_function import HookFunction

__all__ = ["Capturing", "Editing", "capturing", "editing"]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class _Around(AbstractContextManager[T]):
    def __init__(self, model: Callable[..., Any], block: AbstractContextManager[T]) -> None:
        self._model, self._block = model, block

    def __enter__(self) -> T:
        return self._block.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> bool | None:
        return self._block.__exit__(kind, error, where)


class Capturing(_Around[Captured]):
    """``with fm.capture(...) as acts:``, or ``acts = fm.capture(...).run(...)``."""

    def run(self, *args: Any, **inputs: Any) -> Captured:
        """Call the model once, and return what was captured; the arguments are the model's.

        >>> fm.capture(fm.at("resid_post")).run(ids).stack().shape                          # doctest: +SKIP
        torch.Size([30, 4, 6, 576])
        """
        with self as acts:
            self._model(*args, **inputs)
        return acts


class Editing(_Around[list[HookFunction]]):
    """``with fm.edit(...):``, or ``output = fm.edit(...).run(...)``."""

    def run(self, *args: Any, **inputs: Any) -> Any:
        """Call the model once with the edit, and return its output; the arguments are the model's.

        >>> fm.edit(fm.at("z", 5, head=3), edits.zero()).run(ids).logits                    # doctest: +SKIP
        """
        with self:
            return self._model(*args, **inputs)


def capturing(method: Callable[P, Iterator[Captured]]) -> Callable[P, Capturing]:
    """A method of the model that is written as for ``contextmanager``."""
    return _around(method, Capturing)


def editing(method: Callable[P, Iterator[list[HookFunction]]]) -> Callable[P, Editing]:
    """The same of a method that yields hooks."""
    return _around(method, Editing)


def _around(method: Callable[P, Iterator[T]], kind: Callable[[Any, AbstractContextManager[T]], R]) -> Callable[P, R]:
    block = contextmanager(method)

    @wraps(method)
    def make(*args: P.args, **keywords: P.kwargs) -> R:
        return kind(args[0], block(*args, **keywords))

    return make
