"""``flex-model doctor``: does this installation, on these processes, give hooks the right values?"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from flex_model import FlexModel
from flex_model.check.doctor import examine_model, examine_processes, versions
from flex_model.check.report import Report
from flex_model.cli.models import find_model, require
from flex_model.cli.spread import Spread, Tp
from flex_model.cli.start import Cache, launch, started, told
from flex_model.table import show

__all__ = ["doctor"]

_TOY = "toy"
_SITE = ("name", "side", "shape", "layout", "evidence")


@dataclass(frozen=True, slots=True)
class Visit:
    """What each process is told."""

    model: str
    folder: Path | None  # None: the toy
    tp: int


def doctor(
    model: Annotated[
        str, typer.Option(help="A folder of transformers weights, a GGUF, or: smollm2, tiny-llama, tiny-qwen3, toy")
    ] = _TOY,
    tp: Tp = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables")] = False,
    sites: Annotated[bool, typer.Option("--sites", help="List the layout of every site as well")] = False,
    cache: Cache = Path(".models"),
) -> None:
    """Look at versions, processes, mesh, layouts, replicas and parity with one process; exit code 1 if one fails.

    Weights are run in float64, so that what differs by more than 1e-5 is no rounding.
    """
    with told():
        folder = None
        if model != _TOY:
            require(["transformers", "safetensors", "accelerate"], install="'flex-model[hf]'")
            folder = find_model(model, cache)
            Spread(tp).check(folder)
    visit = Visit(model, folder, tp)
    with told(1):
        found = visited(visit) if tp == 1 or started() else launch(visited, visit, tp)[0]
    if int(os.environ.get("RANK", 0)) == 0:
        _print(found, as_json, sites)
    if not found["ok"]:
        raise typer.Exit(1)


def visited(visit: Visit) -> dict[str, Any]:
    """One process's part: what it found, as plain data."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // visit.tp))
    report, fm = Report(), None
    try:
        built, inputs, reference = _toy(visit.tp) if visit.folder is None else _loaded(visit.folder, visit.tp)
        examine_processes(report)
        fm = FlexModel(built)
        examine_model(report, fm, inputs, reference=reference if visit.tp > 1 else False)
        if visit.tp == 1:
            report.add("parity", "ok", "", "this is one process; compare with --tp N")
    except Exception as error:
        report.add("doctor", "fail", visit.model, f"{type(error).__name__}: {error}", "run the model without hooks")
    rows = [] if fm is None else [r for r in fm.sites() if r.layout]
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    return {
        "ok": report.ok, "model": visit.model, "tp": visit.tp, "versions": versions(), "rows": report.as_dicts(),
        "sites": [{key: getattr(row, key) for key in _SITE} for row in rows],
    }  # fmt: skip


def _loaded(folder: Path, tp: int) -> tuple[nn.Module, dict[str, Any], Callable[[], nn.Module]]:
    model = Spread(tp).load(folder, torch.float64)  # in float32 rounding alone is more than 1e-5 of some gradients
    device = next(model.parameters()).device
    vocabulary: int = model.config.get_text_config().vocab_size  # type: ignore[union-attr,operator]
    ids = torch.randint(0, vocabulary, (2, 12), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids.to(device), "use_cache": False}
    return model, inputs, lambda: Spread().load(folder, torch.float64).to(device)


class _Block(nn.Module):
    """The toy's: a norm and a small MLP."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.act, self.down = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(self.act(self.up(self.norm(x))))
        return out


def _toy(tp: int) -> tuple[nn.Module, dict[str, Any], Callable[[], nn.Module]]:
    """Two blocks of plain torch, so that nothing but torch can be at fault."""

    def plain() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(*(_Block(8, 16 * tp) for _ in range(2)))

    model = plain()
    if tp > 1:
        if not dist.is_initialized():  # torchrun has started it
            dist.init_process_group("gloo")
        kind = "cuda" if "nccl" in dist.get_backend() else "cpu"
        model.to(kind)
        mesh = init_device_mesh(kind, (tp,), mesh_dim_names=("tp",))
        parallelize_module(model, mesh, {"*.up": ColwiseParallel(), "*.down": RowwiseParallel()})
    device = next(model.parameters()).device
    inputs = {"input": torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)).to(device)}
    return model, inputs, lambda: plain().to(device)


def _print(found: dict[str, Any], as_json: bool, sites: bool) -> None:
    if as_json:
        print(json.dumps(found, indent=1))
        return
    show(["package", "version"], [[k, v] for k, v in found["versions"].items()])
    report = Report()
    for row in found["rows"]:
        report.add(**row)
    report.show(f"\n{found['model']}, --tp {found['tp']}")
    if sites:
        print()
        show(_SITE, [[str(row[key] or "") for key in _SITE] for row in found["sites"]])
    bad = sum(row["status"] in ("fail", "not run") for row in found["rows"])
    print(f"\n{'All is well.' if found['ok'] else f'{bad} rows failed or were not run.'}")
