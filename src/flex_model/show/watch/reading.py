"""``Run``: what a run's folder says by now: the lines of ``fm.log``, and the commits of a store."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flex_model.errors import FlexModelError
from flex_model.show.log import FOLDER

__all__ = ["Run"]

_KEPT = 600  # points of a line that are shown; of longer runs every second one is left out


@dataclass
class _Rank:
    """One rank's file, as far as it was read."""

    path: Path
    at: int = 0
    rest: bytes = b""
    begun: float = 0.0
    last: float = 0.0
    calls: int = 0
    ended: bool = False
    hooks: list[list[Any]] = field(default_factory=list)
    fired: list[int] = field(default_factory=list)
    squares: dict[int, dict[str, list[float]]] = field(default_factory=dict)  # by call
    refused: dict[str, str] = field(default_factory=dict)

    def read(self) -> None:
        with suppress(OSError), self.path.open("rb") as file:
            file.seek(self.at)
            new = file.read()
            self.at += len(new)
            *lines, self.rest = (self.rest + new).split(b"\n")  # the last one is still being written
            for line in lines:
                self._take(json.loads(line))

    def _take(self, line: dict[str, Any]) -> None:
        if "begin" in line:  # also of a run that goes on in the same folder
            self.begun, self.last, self.ended, self.calls = line["begin"], line["begin"], False, 0
            self.squares.clear()
        elif "end" in line:
            self.last, self.ended = line["end"], True
        else:
            self.last, self.calls = line["time"], line["call"] + 1
            self.hooks, self.fired = line.get("hooks", self.hooks), line["fired"]
            self.refused |= line.get("refused", {})
            if "squares" in line:
                self.squares[line["call"]] = line["squares"]

    def state(self) -> dict[str, Any]:
        took = self.last - self.begun
        return {
            "calls": self.calls,
            "rate": self.calls / took if took > 0 else 0.0,
            "last": self.last,
            "ended": self.ended,
            "hooks": [[*hook, fired] for hook, fired in zip(self.hooks, self.fired, strict=False)],
            "refused": self.refused,
        }


class Run:
    """The folder of a run, which may still be empty. Raises FlexModelError if there is no such folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise FlexModelError(
                f"{self.path}: there is no such folder; give that of fm.log or of a harvest.", page="bad-argument"
            )
        self._ranks: dict[str, _Rank] = {}
        self._commits: dict[int, dict[str, Any]] = {}

    def state(self) -> dict[str, Any]:
        """All that the page shows, as JSON."""
        for path in sorted((self.path / FOLDER).glob("rank-*.jsonl")):
            rank = self._ranks.setdefault(path.stem, _Rank(path))
            rank.read()
        return {
            "path": str(self.path.resolve()),
            "now": time.time(),
            "ranks": {name: rank.state() for name, rank in self._ranks.items()},
            "lines": self._lines(),
            "store": self._store(),
        }

    def _lines(self) -> dict[str, list[list[float]]]:
        """{site: [[forward, root mean square], ...]} of the forwards that all ranks have written."""
        ranks = list(self._ranks.values())
        done = min((r.calls for r in ranks), default=0)
        calls = sorted({call for r in ranks for call in r.squares if call < done})  # not every rank need have any
        while len(calls) > _KEPT:
            calls = calls[::2]
        lines: dict[str, list[list[float]]] = {}
        for call in calls:
            sums: dict[str, list[float]] = {}
            for name, (squares, count) in (pair for r in ranks for pair in r.squares.get(call, {}).items()):
                total = sums.setdefault(name, [0.0, 0.0])
                total[0] += squares
                total[1] += count
            for name, (squares, count) in sums.items():
                lines.setdefault(name, []).append([call, (squares / count) ** 0.5 if count else 0.0])
        return lines

    def _store(self) -> dict[str, Any] | None:
        """What a harvest has committed here; None if nothing harvests here."""
        if not (self.path / "manifest.json").exists():
            return None
        from flex_model.store.commits import Commit, committed_steps, folder, load_moments
        from flex_model.store.manifest import Manifest
        from flex_model.store.place import open_place

        place = open_place(self.path)
        manifest = Manifest.load(place)
        assert manifest is not None
        width = sum(site.row_bytes for site in manifest.all.values())
        for step in committed_steps(place):
            if step not in self._commits:
                moments = load_moments(place, Commit.load(place, step))
                rows = max((int(m.count.max()) for m in moments.values()), default=0)
                self._commits[step] = {
                    "point": [step, (self.path / folder(step) / "done.json").stat().st_mtime, rows, rows * width],
                    "norms": {name: m.norm for name, m in moments.items()},
                }
        done = sorted(self._commits.items())
        return {
            "commits": [commit["point"] for _, commit in done],
            "lines": {n: [[s, c["norms"][n]] for s, c in done if n in c["norms"]] for n in manifest.sites},
            "steps": manifest.about.get("steps"),
            "sites": {name: list(site.shape) for name, site in manifest.sites.items()},
        }
