"""Commits: what was written up to a step. Each rank writes a table of its own; one joins them, and then it counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flex_model.errors import StoreError
from flex_model.store.manifest import StoredSite, pack, unpack
from flex_model.store.moments import Moments
from flex_model.store.place import Place
from flex_model.store.segment import Segment, checksum

__all__ = ["Commit", "Run", "committed_steps", "drop_uncommitted", "join_ranks", "load_moments", "save_moments"]

_FOLDER = re.compile(r"segments/[\w-]+/[\w-][\w.-]*")  # never out of the store


class Run(NamedTuple):
    """``length`` rows of a part of a step, from row ``first`` of a segment (its number in the commit)."""

    segment: int
    step: int
    part: int
    first: int
    length: int


@dataclass(slots=True)
class Commit:
    """What was written since the commit before, up to and with ``step``; by one rank, or by all."""

    step: int
    segments: list[Segment] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    moments: str = ""  # the checksum of the statistics of all rows so far

    def add(self, other: Commit) -> None:
        shift = len(self.segments)
        self.segments += other.segments
        self.runs += [run._replace(segment=run.segment + shift) for run in other.runs]

    def save(self, place: Place, name: str, **more: Any) -> None:
        listed = [segment.to_json() for segment in self.segments]
        place.write(
            name, pack({"step": self.step, "segments": listed, "runs": self.runs, "moments": self.moments, **more})
        )

    @classmethod
    def load(cls, place: Place, step: int) -> Commit:
        """One that counts."""
        name = f"{folder(step)}/done.json"
        data = place.read(name)
        if data is None:
            raise StoreError(
                f"{place}/{name} is gone; bring it back from a copy, or write the store anew.", page="store-damaged"
            )
        return cls.from_json(unpack(data, what=f"{place}/{name}"))

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Commit:
        segments = [Segment(**segment) for segment in body["segments"]]
        for segment in segments:
            if not _FOLDER.fullmatch(segment.folder):
                raise StoreError(
                    f"step {body['step']} names the segment {segment.folder!r}; expected a folder in segments/.",
                    page="store-damaged",
                )
        return cls(body["step"], segments, [Run(*run) for run in body["runs"]], body["moments"])


def folder(step: int) -> str:
    return f"commits/{step:012d}"


def rank_file(step: int, rank: int, suffix: str = "json") -> str:
    return f"{folder(step)}/rank-{rank:05d}.{suffix}"


def committed_steps(place: Place) -> list[int]:
    """The steps that are the last of a whole commit."""
    return [int(name.split("/")[1]) for name in place.listing("commits") if name.endswith("/done.json")]


def join_ranks(
    place: Place, step: int, *, ranks: int, session: int, sites: Mapping[str, StoredSite], allowed: Callable[[], None]
) -> None:
    """Make the commit of ``step`` count, if all ranks' tables are there, their parts make wholes, and it is ``allowed``
    still, which is asked last: who takes the store over removes what does not count yet."""
    tables = [_of_rank(place, step, rank, session) for rank in range(ranks)]
    whole = Commit(step)
    for table in tables:
        whole.add(Commit.from_json(table))
    _check_whole(whole, sites)
    before = [s for s in committed_steps(place) if s < step]
    moments = load_moments(place, Commit.load(place, before[-1])) if before else {}
    for rank, table in enumerate(tables):
        _merge(moments, _arrays(place, rank_file(step, rank, "safetensors"), table["moments"]), table["lanes"], sites)
    whole.moments = save_moments(place, f"{folder(step)}/moments.safetensors", moments)
    allowed()
    whole.save(place, f"{folder(step)}/done.json")
    place.remove([n for n in place.listing(folder(step)) if n.rpartition("/")[2].startswith("rank-")])


def _of_rank(place: Place, step: int, rank: int, session: int) -> Any:
    name = rank_file(step, rank)
    data = place.read(name)
    table = unpack(data, what=f"{place}/{name}") if data is not None else None
    if table is None or table["session"] != session:
        raise StoreError(
            f"step {step}: rank {rank} has not committed; expected commit({step}) of every rank before publish.",
            page="store-incomplete",
        )
    return table


def _check_whole(commit: Commit, sites: Mapping[str, StoredSite]) -> None:
    """Every part of every step has the same rows in all sites, and all columns exactly once."""
    found: dict[tuple[int, int], dict[str, list[tuple[int, int, int]]]] = {}
    for run in commit.runs:
        segment = commit.segments[run.segment]
        part = found.setdefault((run.step, run.part), {})
        part.setdefault(segment.site, []).append((segment.start, segment.stop, run.length))
    for (step, number), held in sorted(found.items()):
        counts = sorted({count for pieces in held.values() for _, _, count in pieces})
        if len(counts) > 1:
            _refuse(step, number, f"its sites have {' and '.join(map(str, counts))} rows; expected one number of rows")
        for name, site in sites.items():
            if not _tiles(held.get(name, ()), site.width):
                has = ", ".join(f"{a} to {b}" for a, b, _ in sorted(held.get(name, ()))) or "none"
                _refuse(step, number, f"{name!r} has columns {has}; expected 0 to {site.width}, each once")


def _tiles(pieces: Iterable[tuple[int, int, int]], width: int) -> bool:
    reached = 0
    for start, stop, _ in sorted(pieces):
        if start != reached:
            return False
        reached = stop
    return reached == width


def _refuse(step: int, part: int, why: str) -> None:
    raise StoreError(f"step {step}, part {part}: {why}; have every rank append what it holds.", page="store-incomplete")


def save_moments(place: Place, name: str, moments: Mapping[str, Moments]) -> str:
    """The file's checksum."""
    from safetensors.numpy import save

    data = save({f"{kind}/{n}": getattr(m, kind) for n, m in moments.items() for kind in _KINDS})
    place.write(name, data)
    return checksum(data)


_KINDS = ("count", "mean", "m2")


def load_moments(place: Place, commit: Commit) -> dict[str, Moments]:
    """By site, of all rows up to a commit."""
    arrays = _arrays(place, f"{folder(commit.step)}/moments.safetensors", commit.moments)
    names = [name.removeprefix("count/") for name in arrays if name.startswith("count/")]
    return {name: Moments(*(arrays[f"{kind}/{name}"].copy() for kind in _KINDS)) for name in names}


def _arrays(place: Place, name: str, check: str) -> Any:
    from safetensors.numpy import load

    data = place.read(name)
    if data is None or checksum(data) != check:
        raise StoreError(f"{place}/{name} is not what was written; bring it back from a copy.", page="store-damaged")
    return load(data)


def _merge(
    whole: dict[str, Moments], arrays: Any, lanes: Sequence[tuple[str, int, int]], sites: Mapping[str, StoredSite]
) -> None:
    for number, (site, start, stop) in enumerate(lanes):
        part = Moments(*(arrays[f"{kind}/{number}"] for kind in _KINDS))
        whole.setdefault(site, Moments.zeros(sites[site].width)).merge(part, (start, stop))


def drop_uncommitted(place: Place) -> list[int]:
    """Remove what no commit names, as a writer that was stopped leaves it; the steps of the commits that count."""
    steps = committed_steps(place)
    kept = {segment.folder for step in steps for segment in Commit.load(place, step).segments}
    done = {folder(step) for step in steps}
    files = [n for n in place.listing("segments") if "/".join(n.split("/")[:3]) not in kept]
    files += [n for n in place.listing("commits") if "/".join(n.split("/")[:2]) not in done or "/rank-" in n]
    place.remove(files)
    return steps
