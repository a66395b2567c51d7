"""``Loader``: a user's batches, from any number on; and what a store says of them, to go on with the same."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from flex_model.errors import HarvestError

if TYPE_CHECKING:
    from flex_model.core.flex_model import FlexModel
    from flex_model.harvest.run import Asked
    from flex_model.harvest.writing import Begun

__all__ = ["Loader", "about_run", "check_same"]


class Loader:
    """Any iterable of batches. One with ``state_dict`` and ``load_state_dict``, or ``iter_from(number)``, as
    ``texts.TokenBatches``, begins in the middle without going through what was before. ``own``: each rank has another.
    """

    def __init__(self, given: Iterable[Any], *, own: bool) -> None:
        self._given: Any = given
        self._stateful = not own and hasattr(given, "state_dict") and hasattr(given, "load_state_dict")

    @property
    def total(self) -> int | None:
        """Batches, if that is known."""
        try:
            return len(self._given)
        except TypeError:
            return getattr(self._given, "total", None)

    def batches(self, first: int, state: Any = None) -> Iterator[Any]:
        """From a number on; ``state``: that of behind the batch before it."""
        if first and self._stateful and state is not None:
            self._given.load_state_dict(state)
            return iter(self._given)
        if first and hasattr(self._given, "iter_from"):
            found: Iterator[Any] = self._given.iter_from(first)
            return found
        return islice(self._given, first, None)

    def state(self) -> Any:
        """Behind the last batch; None where there is none that JSON can hold."""
        if not self._stateful:
            return None
        state = self._given.state_dict()
        try:
            json.dumps(state)
        except TypeError:
            return None
        return state


def about_run(fm: FlexModel, batches: Any, job: Asked) -> dict[str, Any]:
    """What the store says of how it was made. What is under ``data`` must not change when it is gone on with."""
    config, wanted = getattr(fm.module, "config", None), job.wanted
    data = {
        "batches": getattr(batches, "fingerprint", None),
        "positions": repr(wanted.positions),
        "exclude_tokens": list(wanted.exclude),
        "rows": wanted.rows,
        "own_batches": job.own_batches,
    }
    return {
        "model": getattr(config, "name_or_path", "") or type(fm.module).__name__,
        "revision": getattr(config, "_commit_hash", None),
        "hook_type": job.hook_type,
        "batches": getattr(batches, "about", None),
        **job.about,
        "data": data,
    }


def check_same(path: str, begun: Begun | None, here: dict[str, Any]) -> None:
    """That a store was begun by the same run. Raises HarvestError."""
    if begun is None:
        return
    before, now = begun.about.get("data", {}), json.loads(json.dumps(here["data"], default=str))
    wrong = [name for name in now if before.get(name) != now[name]]
    if begun.about.get("model") != here["model"]:
        wrong, before, now = ["model"], begun.about, here
    if wrong:
        name, there, mine = _told(wrong[0], before, now, begun.about.get("batches"), here["batches"])
        raise HarvestError(
            f"{path} was begun with {name}={there!r}, and this run has {mine!r}; choose another path, or the same data "
            f"and options.",
            page="harvest-resume",
        )


def _told(name: str, before: Any, now: Any, then: Any, here: Any) -> tuple[str, Any, Any]:
    """What differs, in the words of the batches where these have some."""
    if name == "batches" and isinstance(then, dict) and isinstance(here, dict):
        here = json.loads(json.dumps(here, default=str))
        for told in ("options", "tokenizer", "sources"):
            a, b = then.get(told), here.get(told)
            if isinstance(a, dict) and isinstance(b, dict):
                for option in b:
                    if a.get(option) != b[option]:
                        return option, a.get(option), b[option]
            elif a != b:
                return told, a, b
    return name, before.get(name), now[name]
