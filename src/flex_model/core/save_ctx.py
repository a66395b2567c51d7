"""``save_ctx``: where editing functions leave values for one another."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from flex_model.errors import EditError

__all__ = ["SaveContext", "Saved"]


@dataclass(slots=True)
class Saved:
    """What a ``save_ctx`` holds at one moment; ``withheld``: what could not come from another stage, and why."""

    values: dict[str, object] = field(default_factory=dict)
    withheld: dict[str, str] = field(default_factory=dict)

    def copy(self) -> Saved:
        return Saved(dict(self.values), dict(self.withheld))

    def changed_since(self, before: Saved) -> dict[str, object]:
        nothing = object()
        return {n: v for n, v in self.values.items() if before.values.get(n, nothing) is not v}


class SaveContext(Namespace):
    """A namespace shared by all editing functions of one model; tensors in it keep their graph.

    In a pipeline each microbatch has its own, which starts from what was there before the step and travels from stage
    to stage. Across stages values are detached copies: reading a tensor there that needs a gradient is an error.

    >>> ctx = SaveContext()
    >>> ctx.activation = 3
    >>> ctx.activation
    3
    """

    __slots__ = ("_saved",)

    def __init__(self) -> None:
        super().__init__()
        self.hold(Saved())

    def __getattr__(self, name: str) -> object:
        reason = self.held.withheld.get(name) if name != "_saved" else None
        if reason is not None:
            raise EditError(f"save_ctx.{name} is on another stage: {reason}", page="save-ctx-elsewhere")
        raise AttributeError(f"save_ctx has no {name!r}: no hook that ran so far has written it.")

    def hold(self, saved: Saved) -> None:
        """Show, and write to, what is in ``saved``."""
        object.__setattr__(self, "_saved", saved)
        self.__dict__ = saved.values

    @property
    def held(self) -> Saved:
        saved: Saved = self._saved  # type: ignore[assignment]
        return saved

    def snapshot(self) -> dict[str, object]:
        return dict(self.__dict__)

    @contextmanager
    def replayed(self, snapshot: dict[str, object]) -> Iterator[None]:
        """Show what was there at an earlier moment (a recomputation must not see later writes), then go back."""
        now = self.held
        self.hold(Saved(dict(snapshot), now.withheld))
        try:
            yield
        finally:
            self.hold(now)
