"""``Run``: what ``record`` saw of one run, site by site; it can be saved, loaded and compared."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from flex_model.check.measure import PROJECTIONS, Statistics
from flex_model.errors import FlexModelError, summary
from flex_model.table import as_text

__all__ = ["Place", "Run", "RunError", "What"]

What = Literal["value", "gradient of the output", "gradient of the input"]
_WHATS = ("value", "gradient of the output", "gradient of the input")
_NUMBERS = ("mean", "std", "norm", "low", "high")
_FORMAT = 1
_MOST = 2**30  # bytes of JSON that are read


class RunError(FlexModelError, ValueError):
    """A file that is no run, or a run that cannot be compared."""

    page = "run-unusable"


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """One tensor of one call of a module: what it passed on, or a gradient."""

    name: str
    what: What
    index: int = 0  # of the tensor in the module's output or input
    call: int = 0

    def __str__(self) -> str:
        extra = f"[{self.index}]" * bool(self.index) + f" call {self.call}" * bool(self.call)
        return f"{self.name or '(the model)'}{extra}" + ("" if self.what == "value" else f", {self.what}")


@dataclass(slots=True)
class Run:
    """Statistics by place; values in the order of the forward, gradients in that of the backward.

    ``refused``: {place or name: why}, of values that have no whole or could not be measured.
    """

    measured: dict[Place, Statistics] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.measured)

    def __iter__(self) -> Iterator[Place]:
        return iter(self.measured)

    def __getitem__(self, place: Place | str) -> Statistics:
        return self.measured[Place(place, "value") if isinstance(place, str) else place]

    def __str__(self) -> str:
        columns = ["place", "shape", "layout", "mean", "std", "norm", "min", "max", "nan", "inf"]
        rows = [
            [str(p), str(list(s.shape)), s.layout, *(f"{x:.4g}" for x in (s.mean, s.std, s.norm, s.low, s.high)),
             str(s.nan), str(s.inf)]
            for p, s in self.measured.items()
        ]  # fmt: skip
        return as_text(columns, rows)

    # -- files -------------------------------------------------------------------------------------------------
    def save(self, path: str | Path) -> Path:
        """Write ``path`` with the endings ``.json`` and ``.safetensors``; returns the first."""
        from safetensors.torch import save_file

        table, numbers = _files(path)
        rows = [
            {
                "name": p.name, "what": p.what, "index": p.index, "call": p.call, "shape": list(s.shape),
                "dtype": s.dtype, "layout": s.layout, "nan": s.nan, "inf": s.inf, "spread": s.spread,
            }
            for p, s in self.measured.items()
        ]  # fmt: skip
        found = list(self.measured.values())
        floats = torch.tensor([[getattr(s, n) for n in _NUMBERS] for s in found], dtype=torch.double)
        projections = torch.tensor([s.projections for s in found], dtype=torch.double)
        table.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"statistics": floats.reshape(-1, 5), "projections": projections.reshape(-1, PROJECTIONS)}
        save_file(tensors, numbers)
        content = {"flex_model.run": _FORMAT, "about": self.about, "refused": self.refused, "rows": rows}
        table.write_text(json.dumps(content, indent=1))
        return table

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Read what ``save`` wrote. Names in it are only names: no file is opened but the two."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        table, numbers = _files(path)
        try:
            if table.stat().st_size > _MOST:
                raise RunError(f"{table}: {table.stat().st_size} bytes are too many for the table of a run.")
            content = json.loads(table.read_text())
            tensors = load_file(numbers)
            return _parsed(content, tensors)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise RunError(f"{table}: this is no saved run: {summary(error)}; expected what Run.save wrote.") from error


def _files(path: str | Path) -> tuple[Path, Path]:
    path = Path(path)
    path = path.with_suffix("") if path.suffix in (".json", ".safetensors") else path
    return path.with_name(path.name + ".json"), path.with_name(path.name + ".safetensors")


def _parsed(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Run:
    if content["flex_model.run"] != _FORMAT:
        raise ValueError(f"its format is {content['flex_model.run']!r}, this version reads {_FORMAT}")
    rows, floats, projections = content["rows"], tensors["statistics"], tensors["projections"]
    if floats.shape != (len(rows), 5) or projections.shape != (len(rows), PROJECTIONS):
        raise ValueError("its two files do not belong together")
    measured = {}
    for row, numbers, projected in zip(rows, floats.tolist(), projections.tolist(), strict=True):
        if row["what"] not in _WHATS:
            raise ValueError(f"{row['what']!r} is none of {_WHATS}")
        place = Place(str(row["name"]), row["what"], int(row["index"]), int(row["call"]))
        measured[place] = Statistics(
            shape=tuple(int(s) for s in row["shape"]),
            dtype=str(row["dtype"]),
            layout=str(row["layout"]),
            **dict(zip(_NUMBERS, numbers, strict=True)),
            nan=int(row["nan"]),
            inf=int(row["inf"]),
            spread={str(k): float(v) for k, v in row["spread"].items()},
            projections=tuple(projected),
        )
    strings = [{str(k): str(v) for k, v in content[key].items()} for key in ("refused", "about")]
    return Run(measured, *strings)
