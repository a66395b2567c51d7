"""``StageNames``: the names on all stages of a pipeline, as their ranks have told one another."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from flex_model.errors import NameNotFoundError

__all__ = ["StageNames", "StageTable"]


@dataclass(frozen=True, slots=True)
class StageTable:
    """The names on one pipeline stage, as its ranks tell the others."""

    stage: int
    coordinate: int  # of its ranks, along the stage axis
    modules: Mapping[str, str]  # clean name -> class
    parameters: Mapping[str, bool]  # clean name -> requires a gradient
    silent: frozenset[str] = frozenset()  # modules that never fire
    same: Mapping[str, str] = field(default_factory=dict)  # another name of a module -> its first
    tied: Mapping[str, str] = field(default_factory=dict)  # the same of parameters


class StageNames:
    """The tables of all stages in order; none, and false, where there is no pipeline."""

    def __init__(self, tables: Iterable[StageTable] = ()) -> None:
        self.tables = sorted(tables, key=lambda t: t.stage)
        self._modules = dict.fromkeys(n for t in self.tables for n in t.modules)
        self._parameters = dict.fromkeys(n for t in self.tables for n in t.parameters)

    def __bool__(self) -> bool:
        return bool(self.tables)

    def all(self, of: str) -> Collection[str]:
        """All clean names in the model's order."""
        return self._modules if of == "module" else self._parameters

    def holder(self, name: str, side: str) -> StageTable | None:
        """The stage a site is on, None without a pipeline. A module that stages share, such as the model itself, gets
        its input on the first of them and gives its output on the last."""
        having = [t for t in self.tables if name in (t.parameters if side == "param" else t.modules)]
        real = [t for t in having if t.modules.get(name) != "Identity"]  # else it only fills a place
        having = real or having
        return having[-1 if side == "out" else 0] if having else None

    def requires_grad(self, name: str) -> bool:
        return any(t.parameters.get(name, False) for t in self.tables)

    def class_of(self, name: str) -> str | None:
        return next((t.modules[name] for t in self.tables if name in t.modules), None)

    def never_fires(self, name: str) -> bool | None:
        """None: no stage has it."""
        having = [t for t in self.tables if name in t.modules]
        return all(name in t.silent for t in having) if having else None

    def others(self, of: str) -> dict[str, str]:
        """{another name of a module or parameter: its first name}."""
        return {n: f for t in self.tables for n, f in (t.same if of == "module" else t.tied).items()}

    def check_collisions(self, renamed: Collection[str], here: Collection[int]) -> None:
        """Slices that count their layers from 0 have the same names; only the user knows the plain model's.

        ``renamed`` are the names the user gave, ``here`` the stages of this rank.
        """
        seen: dict[str, int] = {}
        counts: dict[str, int] = {}
        renames: dict[str, str] = {}
        twice = ""
        for table in self.tables:
            for name in table.parameters:
                if seen.setdefault(name, table.stage) != table.stage and name not in renamed:
                    twice = twice or f"stages {seen[name]} and {table.stage} both have {name!r}"
            lists = [n for n, kind in table.modules.items() if kind in ("ModuleList", "Sequential")]
            for owner in lists:
                inner = [n for n in table.modules if n.rpartition(".")[0] == owner and n.rpartition(".")[2].isdigit()]
                if table.stage in here:
                    renames |= {n: f"{owner}.{counts.get(owner, 0) + i}".lstrip(".") for i, n in enumerate(inner)}
                counts[owner] = counts.get(owner, 0) + len(inner)
        if twice:
            raise NameNotFoundError(
                f"{twice}, so names do not tell which module is meant. Slice the model so that its parts keep their "
                f"names, or give the plain model's: FlexModel(..., names={{this rank's name: plain name}}); if each "
                f"stage goes on counting where the one before ended, names={renames} on this rank.",
                page="stage-names-collide",
            )
