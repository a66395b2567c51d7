"""``Writing``: a harvest's way into the store, on all ranks: opened together, committed now and then, resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flex_model.errors import HarvestError
from flex_model.harvest.sink import Step
from flex_model.harvest.together import Together
from flex_model.store import ActivationStore, StoredSite, StoreWriter
from flex_model.store.place import MANIFEST, open_place, telling

__all__ = ["Begun", "Writing"]

_LOADER = "loader.json"  # where the loader was at the last two commits


@dataclass(frozen=True, slots=True)
class Begun:
    """A store that another run has begun."""

    next_step: int
    about: dict[str, Any]
    place: Any  # of its loader; None where that was not kept


class Writing:
    """``bytes``: written by this run, of this rank.

    A commit is made while later steps run, and counts at the next one, once every rank's rows are on disk.
    """

    def __init__(self, path: str | Path, together: Together, **limits: int) -> None:
        self.path, self.together, self._limits = path, together, limits
        self.bytes = 0
        self._writer: StoreWriter | None = None
        self._pending: int | None = None
        self._places: dict[str, Any] = {}  # {step of a commit: where the loader was}, of the last two
        self._kept: Step | None = None  # its values may still be on their way from a device
        self._beside: tuple[Mapping[str, Tensor], list[tuple[int, int]]] = ({}, [])

    # -- opening -----------------------------------------------------------------------------------------------
    @property
    def sites(self) -> dict[str, StoredSite]:
        """Of the store that is there."""
        store = ActivationStore(self.path)
        return {n: StoredSite(store[n].shape[1:], store[n].dtype, store[n].layout) for n in store.sites}

    def look(self, *, resume: bool) -> Begun | None:
        """The store that is there, if any; one without a commit is begun anew."""

        def read() -> Begun | None:
            place = open_place(self.path)
            with telling(f"{place} cannot be read"):
                there = place.read(MANIFEST) is not None
                loader = place.read(_LOADER)
            if not there:
                return None
            store = ActivationStore(self.path)
            if store.last_step < 0:
                return None
            if not resume:
                raise HarvestError(
                    f"{place} is a store already, and resume=False was given; choose another path, or remove it.",
                    page="harvest-resume",
                )
            places = json.loads(loader) if loader is not None else {}
            return Begun(store.last_step + 1, store.about, places.get(str(store.last_step)))

        return self.together.on_main(read, "the look at the store")

    def open(
        self, sites: Mapping[str, StoredSite], columns: Mapping[str, str], about: Mapping[str, Any], *, new: bool
    ) -> None:
        """All ranks; the main one makes the store, or takes it over."""
        own: dict[str, Any] = {"rank": self.together.rank, "ranks": self.together.ranks, **self._limits}

        def first() -> bool:
            if new:
                self._writer = StoreWriter.create(
                    self.path, sites=sites, columns=columns, about=about, over_empty=True, **own
                )
            else:
                self._check_same(sites, columns)
                self._writer = StoreWriter.resume(self.path, **own)
            return True

        self.together.on_main(first, "the opening of the store")

        def join() -> bool:
            if self._writer is None:
                self._writer = StoreWriter.join(self.path, **own)
            return True

        self.together.each(join, "the opening of the store")

    def _check_same(self, sites: Mapping[str, StoredSite], columns: Mapping[str, str]) -> None:
        store = ActivationStore(self.path)
        there = {n: (store[n].shape[1:], store[n].dtype) for n in (*store.sites, *store.columns)}
        here = {n: (s.shape, str(s.dtype)) for n, s in sites.items()} | {n: ((), d) for n, d in columns.items()}
        if there != here:
            wrong = sorted(n for n in there.keys() | here.keys() if there.get(n) != here.get(n))
            raise HarvestError(
                f"{self.path} has other rows than this run would add: {wrong[0]!r} is {there.get(wrong[0], 'absent')} "
                f"there and {here.get(wrong[0], 'absent')} here; choose another path, or resume with the same options.",
                page="harvest-resume",
            )

    def memory(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """On the host, for rows that are put: it is used again once they are written."""
        assert self._writer is not None
        return self._writer.memory(shape, dtype)

    # -- steps -------------------------------------------------------------------------------------------------
    def put(self, step: Step, columns: Mapping[str, Tensor], parts: list[tuple[int, int]]) -> None:
        """A step's values. They are handed on when the next step is put: from a device they take a while."""
        self.flush()
        self._kept, self._beside = step, (columns, parts)

    def flush(self) -> None:
        """Hand on what was put last."""
        step, self._kept = self._kept, None
        if step is None:
            return
        assert self._writer is not None
        step.ready()
        columns, parts = self._beside
        if columns and parts:
            self._writer.append(step.number, {}, part=parts, columns=columns)
        for name, pieces in step.values.items():
            for piece in pieces if step.parts[name] else ():
                rows, start = piece.rows, piece.start
                if not piece.fits:
                    raise HarvestError(
                        f"{name!r} has numbers that are not finite in {rows.dtype}, in step {step.number} on rank "
                        f"{self.together.rank}; store it with dtype='bfloat16' or 'float32'.",
                        page="harvest-dtype",
                    )
                values = {name: (rows, slice(start, start + rows.shape[1]))}
                sums = {} if piece.sums is None else {name: piece.sums}
                self._writer.append(step.number, values, part=step.parts[name], owned=True, sums=sums)
                self.bytes += rows.nbytes

    def commit(self, step: int, place: Any) -> None:
        """Begin to commit all up to ``step``, and make the commit before it count; ``place``: where the loader is
        then. All ranks."""
        self.settle()

        def begin() -> None:
            self.flush()
            assert self._writer is not None
            self._writer.commit(step, wait=False)

        self.together.each(begin, "a commit")
        self._pending = step
        self._places = {**dict(list(self._places.items())[-1:]), str(step): place}

    def settle(self, *, wait: bool = True) -> None:
        """Make the last commit count; without waiting, if all ranks are through with it. All ranks."""
        if self._pending is None:
            return
        writer, step = self._writer, self._pending
        assert writer is not None
        ready = self.together.each(lambda: writer.tabled(step, wait=wait), "a commit")
        if not wait and not all(self.together.tell(ready, "a commit")):
            return

        def publish() -> None:
            place = open_place(self.path)
            with telling(f"{place} cannot be written"):
                place.write(_LOADER, json.dumps(self._places).encode())  # of the commit before, too: it may end here
            writer.publish(step)

        self.together.on_main(publish, "a commit")
        self._pending = None

    def finish(self) -> None:
        """Make the last commit count, and end. All ranks."""
        self.settle()
        if self._writer is not None:
            self._writer.close()

    def drop(self) -> None:
        """End after an error; what is committed stays."""
        if self._writer is not None:
            self._writer.close(drop=True)
