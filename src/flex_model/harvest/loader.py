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
        self.contexts = 0 if not own else None  # given before this batch; None where other ranks give others
        self._stateful = not own and hasattr(given, "state_dict") and hasattr(given, "load_state_dict")

    @property
    def total(self) -> int | None:
        """Batches, if that is known."""
        try:
            return len(self._given)
        except TypeError:
            return getattr(self._given, "total", None)

    def batches(self, first: int, place: Any = None) -> Iterator[Any]:
        """From a number on; ``place``: that behind the batch before it."""
        state = place["state"] if place is not None else None
        if first:
            self.contexts = place["contexts"] if place is not None else None
        if first and self._stateful and state is not None:
            self._given.load_state_dict(state)
            return iter(self._given)
        if first and hasattr(self._given, "iter_from"):
            found: Iterator[Any] = self._given.iter_from(first)
            return found
        return islice(self._given, first, None)

    def place(self) -> Any:
        """Behind the last batch; ``state``: None where there is none that JSON can hold."""
        state = self._given.state_dict() if self._stateful else None
        try:
            json.dumps(state)
        except TypeError:
            state = None
        return {"state": state, "contexts": self.contexts}

    def took(self, contexts: int) -> None:
        if self.contexts is not None:
            self.contexts += contexts


def about_run(fm: FlexModel, batches: Any, job: Asked) -> dict[str, Any]:
    """What the store says of how it was made. What is under ``data`` must not change when it is gone on with."""
    root, wanted = fm._runtime.root, job.wanted
    config, kind = getattr(root, "config", None), fm._runtime.engines.plain_class(root) or type(root)
    told = getattr(batches, "about", None)
    data = {
        "batches": getattr(batches, "fingerprint", None),
        "positions": repr(wanted.positions),
        "exclude_tokens": list(wanted.exclude),
        "rows": wanted.rows,
        "own_batches": job.own_batches,
    }
    return {
        "model": getattr(config, "name_or_path", "") or kind.__name__,
        "revision": getattr(config, "_commit_hash", None),
        "hook_type": job.hook_type,
        "batches": told,
        **_contexts(told),
        **job.about,
        "data": data,
    }


def _contexts(told: Any) -> dict[str, Any]:
    """What exports ask about: how long contexts are, and whether they hold several documents."""
    options = told.get("options", {}) if isinstance(told, dict) else {}
    if "context_size" not in options:
        return {}
    return {"context_size": options["context_size"], "packed": bool(options.get("packing", {}).get("join"))}


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
