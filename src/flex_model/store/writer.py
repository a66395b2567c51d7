"""``StoreWriter``: every rank writes the rows and columns that it holds, and nothing is gathered."""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
from collections.abc import Hashable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from flex_model.errors import StoreError
from flex_model.store import commits
from flex_model.store.buffers import Buffers
from flex_model.store.commits import Commit
from flex_model.store.dtypes import dtype_name, numpy_dtype, row_bytes
from flex_model.store.lane import Folders, Lane, LaneKey
from flex_model.store.manifest import Manifest, StoredSite
from flex_model.store.place import MANIFEST, Place, open_place, telling
from flex_model.store.queue import Work, WriteQueue
from flex_model.store.session import Session

__all__ = ["StoreWriter"]


class StoreWriter:
    """Writes activations, step by step, in threads, with at most ``queue_bytes`` waiting.

    >>> writer = StoreWriter.create("acts", sites={"mlp": StoredSite((576,), "bfloat16")},
    ...                             columns={"token_ids": "int64"})                     # doctest: +SKIP
    >>> for step, batch in enumerate(batches):                                          # doctest: +SKIP
    ...     writer.append(step, {"mlp": rows}, columns={"token_ids": ids})
    ...     if step % 100 == 99:
    ...         writer.commit(step)
    >>> writer.close()                                                                  # doctest: +SKIP

    With several ranks: rank 0 calls ``create`` or ``resume`` and then, after a barrier, the others ``join``. Each
    appends its own: of a data-parallel rank its ``part`` of the step's rows, of a tensor-parallel one its columns. At
    a commit all ranks ``commit(step)`` and then, after a barrier, one ``publish(step)``; with one rank ``commit``
    does both. Rows count once they are published, and are in the order of the data: by step, and within it by part.

    A segment (one file of one site) ends at ``segment_bytes`` and at every commit, so that a commit should hold some
    hundred MiB a rank. In a bucket segments are smaller, for they are in memory until they are put: all of it, queue
    and segments, is within about ``queue_bytes``.

    Raises StoreError in the next ``append`` or ``commit`` if the disk or the network failed.
    """

    def __init__(
        self,
        place: Place,
        manifest: Manifest,
        session: Session,
        *,
        rank: int,
        ranks: int,
        segment_bytes: int,
        queue_bytes: int,
    ) -> None:
        self.sites, self.columns, self.about = manifest.sites, manifest.columns, manifest.about
        self.rank, self.ranks = rank, ranks
        self._place, self._session, self._all = place, session, manifest.all
        if place.buffers:
            queue_bytes = max(1, queue_bytes // 2)
            # each of the queue's two threads may be putting a segment, of which there are three copies when that begins
            segment_bytes = max(1, min(segment_bytes, queue_bytes // (len(self._all) + 4)))
        self._segment_bytes = segment_bytes
        threads = 2 if place.buffers else min(4, max(2, (os.cpu_count() or 1) // 4))
        self._queue = WriteQueue(queue_bytes, threads=threads)
        self._buffers = Buffers(0 if place.buffers else queue_bytes // 2)  # a bucket holds what it was given
        self._lanes: dict[LaneKey, Lane] = {}
        self._seen: dict[tuple[int, int], tuple[int, frozenset[LaneKey]]] = {}  # since the last commit
        self._folders = Folders(f"segments/{session.number:04d}-{rank:05d}")
        self._closed = False
        with telling(f"{place} cannot be read"):
            self._committed = self._tabled = max(commits.committed_steps(place), default=-1)

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        sites: Mapping[str, StoredSite],
        columns: Mapping[str, Any] | None = None,
        about: Mapping[str, Any] | None = None,
        rank: int = 0,
        ranks: int = 1,
        over_empty: bool = False,
        segment_bytes: int = 1 << 28,
        queue_bytes: int = 1 << 30,
    ) -> StoreWriter:
        """A new store in a folder or at a URL, called by one rank.

        ``columns``: dtypes of side columns, one number a row. ``about``: JSON for whoever reads it, such as the
        model's name and revision. ``over_empty``: also in the place of a store that has no commit.
        """
        place = open_place(path)
        told = json.loads(json.dumps({**_about(), **(about or {})}, default=str))
        manifest = Manifest(dict(sites), {n: StoredSite((), d) for n, d in (columns or {}).items()}, told)
        if not sites or manifest.sites.keys() & manifest.columns.keys():
            raise StoreError("expected at least one site, and columns of other names.", page="bad-argument")
        with telling(f"{place} cannot be made a store"):
            there = place.read(MANIFEST) is not None
            if there and (not over_empty or commits.committed_steps(place)):
                raise StoreError(f"{place} is a store already; resume it, or choose another path.", page="store-exists")
            place.make()
            session = Session.of(place).next() if there else Session.first(place)
            manifest.save(place)
        limits = {"segment_bytes": segment_bytes, "queue_bytes": queue_bytes}
        return cls(place, manifest, session, rank=rank, ranks=ranks, **limits)

    @classmethod
    def resume(
        cls,
        path: str | Path,
        *,
        rank: int = 0,
        ranks: int = 1,
        segment_bytes: int = 1 << 28,
        queue_bytes: int = 1 << 30,
    ) -> StoreWriter:
        """Go on after the last whole commit, called by one rank; also with other ranks, parts or splits of columns.

        What lies beyond that commit is removed. Go on at ``writer.next_step``. A writer that still runs on this store
        is refused its next commit.
        """
        place, manifest, session = _opened(path)
        with telling(f"{place} cannot be resumed"):
            session = session.next()
        limits = {"segment_bytes": segment_bytes, "queue_bytes": queue_bytes}
        return cls(place, manifest, session, rank=rank, ranks=ranks, **limits)

    @classmethod
    def join(
        cls,
        path: str | Path,
        *,
        rank: int,
        ranks: int,
        segment_bytes: int = 1 << 28,
        queue_bytes: int = 1 << 30,
    ) -> StoreWriter:
        """Write beside the rank that called ``create`` or ``resume``, after it."""
        place, manifest, session = _opened(path)
        limits = {"segment_bytes": segment_bytes, "queue_bytes": queue_bytes}
        return cls(place, manifest, session, rank=rank, ranks=ranks, **limits)

    @property
    def next_step(self) -> int:
        """The first step that is not committed."""
        return self._committed + 1

    @property
    def bytes_waiting(self) -> int:
        """Given to ``append`` and not written yet."""
        return self._queue.bytes

    def memory(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory for rows to be appended as ``owned``, which is used again once they are written."""
        size = prod(shape) * dtype.itemsize
        if not size:
            return torch.empty(tuple(shape), dtype=dtype)
        return torch.from_numpy(self._buffers.lend(size)).view(dtype).view(tuple(shape))

    def append(
        self,
        step: int,
        values: Mapping[str, Any],
        *,
        part: int | Sequence[tuple[int, int]] = 0,
        columns: Mapping[str, Any] | None = None,
        owned: bool = False,
        sums: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Rows of one part of a step, or of several: ``[(part, rows), ...]``; blocks while the queue is full.

        ``values``: by site, a tensor or array ``(rows, ...)``, or with the slice of the flattened row's columns that
        it is. ``columns``: side columns ``(rows,)``. Sites of one part may come in several calls.

        All are copied, unless they are ``owned`` by the writer from now on: nobody writes to their memory again, and
        a copy from the GPU into it (pinned memory is fine) is over. They are let go when they are written. What is
        not contiguous, or not in host memory, is copied all the same. ``sums``: of sites whose statistics were summed
        where the rows come from: of each column the numbers and their squares, ``(2, columns)`` in float64.
        """
        self._check_open()
        placed = [self._placed(name, value) for name, value in {**values, **(columns or {})}.items()]
        parts = [(part, len(placed[0][0]) if placed else 0)] if isinstance(part, int) else [*part]
        if not isinstance(step, int) or step <= self._committed or any(number < 0 for number, _ in parts):
            raise StoreError(
                f"expected a step from {self.next_step} and a part from 0, got {step!r} and {part!r}.",
                page="bad-argument",
            )
        self._note(step, parts, [(lane, len(rows)) for rows, lane in placed])
        for rows, lane in placed:
            if len(rows):
                self._put(step, parts, lane, rows, owned=owned, sums=(sums or {}).get(lane[0]))

    def _placed(self, name: str, value: Any) -> tuple[Any, LaneKey]:
        """The rows, and which columns of which site they are."""
        rows, where = value if isinstance(value, tuple) else (value, slice(None))
        if name not in self._all:
            raise StoreError(f"{name!r} is none of the store's: {', '.join(self._all)}.", page="bad-argument")
        width = self._all[name].width
        start, stop, stride = where.indices(width)
        if rows.ndim == 0 or stride != 1 or stop <= start or prod(rows.shape[1:]) != stop - start:
            raise StoreError(
                f"{name!r}: expected rows of {stop - start} numbers (columns {start} to {stop} of {width}), got shape "
                f"{tuple(rows.shape)}.",
                page="bad-argument",
            )
        dtype = self._all[name].dtype
        if dtype_name(rows.dtype) != dtype:
            raise StoreError(
                f"{name!r}: expected dtype {dtype}, got {dtype_name(rows.dtype)}; convert with .to(torch.{dtype}).",
                page="bad-argument",
            )
        return rows, (name, start, stop)

    def _note(self, step: int, parts: Sequence[tuple[int, int]], given: Sequence[tuple[LaneKey, int]]) -> None:
        """That these lanes are there; none of them if one is refused."""
        whole = sum(count for _, count in parts)
        noted: dict[tuple[int, int], tuple[int, frozenset[LaneKey]]] = {}
        for number, expected in parts:
            known, lanes = self._seen.get((step, number), (expected, frozenset()))
            for lane, count in given:
                if count != whole or known != expected or lane in lanes:
                    raise StoreError(
                        f"step {step}, part {number}: {lane[0]!r} has {count} rows; expected it once, with {known} "
                        f"rows.",
                        page="bad-argument",
                    )
            noted[step, number] = known, lanes.union(lane for lane, _ in given)
        if given:
            self._seen |= noted

    def _put(
        self,
        step: int,
        parts: Sequence[tuple[int, int]],
        key: LaneKey,
        rows: Any,
        *,
        owned: bool,
        sums: Tensor | None,
    ) -> None:
        dtype = self._all[key[0]].dtype
        size = len(rows) * (key[2] - key[1]) * numpy_dtype(dtype).itemsize
        lane = self._lanes.get(key) or self._lanes.setdefault(key, self._new_lane(key))
        self._queue.reserve(size)
        buffer = None if owned else self._buffers.take(size)
        try:
            data = row_bytes(rows, dtype=dtype, out=None if buffer is None else buffer[:size])
            buffer = self._buffers.returned(data) if owned else buffer
        except BaseException:
            self._queue.put(key, lambda: None, reserved=size)
            raise

        def write() -> tuple[Hashable, Work]:
            lane.append(step, parts, data)
            return ("statistics", key), add_up  # while another thread writes the lane's next rows

        def add_up() -> None:
            lane.add_up(data, sums)
            if buffer is not None:
                self._buffers.give(buffer)

        self._queue.put(key, write, reserved=size)

    def _new_lane(self, key: LaneKey) -> Lane:
        return Lane(
            self._place,
            key,
            self._all[key[0]].dtype,
            folders=self._folders,
            segment_bytes=self._segment_bytes,
            moments=key[0] in self.sites,
        )

    def commit(self, step: int, *, wait: bool = True) -> None:
        """Write this rank's table of all steps up to ``step``, after the rows themselves; with one rank, publish it.

        ``wait=False``: it is written while later steps are appended, and is there after ``tabled(step)``; ``publish``
        it then, also with one rank.
        """
        self._check_open()
        latest = max((s for s, _ in self._seen), default=step)
        if step <= self._committed or latest > step:
            raise StoreError(
                f"expected to commit a step from {max(latest, self.next_step)}, got {step}.", page="bad-argument"
            )
        with telling(f"{self._place} cannot be written"):
            self._session.check()
        lanes, self._lanes, self._seen, self._committed = self._lanes, {}, {}, step
        self._table_of(step, lanes)
        if wait:
            self.tabled(step)
            if self.ranks == 1:
                self.publish(step)

    def _table_of(self, step: int, lanes: dict[LaneKey, Lane]) -> None:
        """Close the lanes, each behind its rows and their statistics, and then write their table."""
        left, lock = len(lanes), threading.Lock()

        def close(key: LaneKey, lane: Lane) -> tuple[Hashable, Work]:
            lane.close()
            return ("statistics", key), closed

        def closed() -> None:
            nonlocal left
            with lock:
                left -= 1
                last = left <= 0
            if last:
                with telling(f"{self._place} cannot be written"):
                    self._save_table(step, lanes)
                self._tabled = step

        for key, lane in lanes.items():
            self._queue.put(key, partial(close, key, lane))
        if not lanes:
            self._queue.put("table", closed)

    def tabled(self, step: int, *, wait: bool = True) -> bool:
        """Whether this rank's table of a commit is written; wait for it unless ``wait=False``."""
        if wait:
            self._queue.wait(lambda: self._tabled >= step)
        return self._tabled >= step

    def _save_table(self, step: int, lanes: Mapping[LaneKey, Lane]) -> None:
        table = Commit(step)
        for lane in lanes.values():
            table.add(Commit(step, lane.segments, lane.runs))
        held = {key: lane.sums.moments() for key, lane in lanes.items() if lane.sums is not None}
        named = {str(number): moments for number, moments in enumerate(held.values())}
        file = commits.rank_file(step, self.rank, "safetensors")
        table.moments = commits.save_moments(self._place, file, named)
        table.save(self._place, commits.rank_file(step, self.rank), session=self._session.number, lanes=list(held))

    def publish(self, step: int) -> None:
        """Make the commit of all ranks count, called by one rank after all have committed."""
        with telling(f"{self._place} cannot be written"):
            self._session.check()
            if step not in commits.committed_steps(self._place):  # with one rank it is there since commit
                ranks, sites, now = self.ranks, self._all, self._session
                commits.join_ranks(self._place, step, ranks=ranks, session=now.number, sites=sites, allowed=now.check)

    def close(self, *, drop: bool = False) -> None:
        """End the threads. Rows that are not committed are lost, and refused without ``drop=True``."""
        if self._closed:
            return
        if self._seen and not drop:
            raise StoreError(
                f"rows up to step {max(s for s, _ in self._seen)} are not committed; commit them, or close(drop=True).",
                page="bad-argument",
            )
        self._closed = True
        self._queue.stop(drop=drop)
        for lane in self._lanes.values():
            lane.drop()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drop=error is not None)

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("this writer is closed; StoreWriter.resume opens the store again.", page="bad-argument")


def _opened(path: str | Path) -> tuple[Place, Manifest, Session]:
    place = open_place(path)
    with telling(f"{place} cannot be opened"):
        manifest = Manifest.load(place)
        if manifest is None:
            raise StoreError(f"{place} is no store; make one with StoreWriter.create.", page="store-exists")
        return place, manifest, Session.of(place)


def _about() -> dict[str, Any]:
    """Of this process."""
    loaded = {
        name: getattr(sys.modules.get(name), "__version__", None) for name in ("torch", "transformers", "flex_model")
    }
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {**{k: v for k, v in loaded.items() if v}, "python": platform.python_version(), "created": now}
