"""``save_ctx``: where editing functions leave values for one another."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["SaveContext"]


class SaveContext(Namespace):
    """A namespace shared by all editing functions of one model; tensors in it keep their graph.

    >>> ctx = SaveContext()
    >>> ctx.activation = 3
    >>> ctx.activation
    3
    """

    def __getattr__(self, name: str) -> object:
        raise AttributeError(f"save_ctx has no {name!r}: no hook that ran so far has written it.")

    def snapshot(self) -> dict[str, object]:
        return dict(self.__dict__)

    @contextmanager
    def replayed(self, snapshot: dict[str, object]) -> Iterator[None]:
        """Show what was there at an earlier moment (a recomputation must not see later writes), then go back."""
        now = dict(self.__dict__)
        self.__dict__.clear()
        self.__dict__.update(snapshot)
        try:
            yield
        finally:
            self.__dict__.clear()
            self.__dict__.update(now)
