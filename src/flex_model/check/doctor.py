"""What a model runs on, looked at from the bottom up: versions, processes, mesh, sites, costs, and ``check``."""

from __future__ import annotations

import platform
import socket
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from flex_model.check.parity import Reference
from flex_model.check.report import Report
from flex_model.routing.collectives import all_gather_objects

if TYPE_CHECKING:
    from flex_model.core.flex_model import FlexModel

__all__ = ["examine_model", "examine_processes", "versions"]

_PACKAGES = ("flex-model", "torch", "transformers", "accelerate", "megatron-core", "fairscale", "safetensors", "numpy")
_BYTES = 2**20
_ALL_PAIRS = 16  # ranks; of more, neighbours are tried
_SKEW = 1.0  # seconds
_PARITY = 1e-5  # of a norm, whatever the dtype: a model's own code may compute in a coarser one


def versions() -> dict[str, str]:
    """Of everything that matters here; "not installed" where it is not."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["CUDA"] = str(torch.version.cuda or "not in this torch")
    found["GPUs"] = str(torch.cuda.device_count())
    return found


# -- processes -------------------------------------------------------------------------------------------------
def examine_processes(report: Report) -> None:
    """Do the processes reach one another, how fast, and do their clocks agree? Collective."""
    if not dist.is_available() or not dist.is_initialized():
        report.add("processes", "ok", "", "one process, no process group")
        return
    group = dist.group.WORLD
    assert group is not None
    device = _device(group)
    hosts = all_gather_objects(socket.gethostname(), group)
    where = f"{dist.get_world_size()} processes on {len(set(hosts))} host{'s' * (len(set(hosts)) > 1)}"
    report.add("processes", "ok", dist.get_backend(group), f"{where}, timeout {_timeout(group, device)}")
    _add_sum(report, group, device)
    _add_pairs(report, group, device)
    _add_clocks(report, group, device)


def _device(group: dist.ProcessGroup) -> torch.device:
    return torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")


def _timeout(group: dist.ProcessGroup, device: torch.device) -> str:
    try:
        return f"{group._get_backend(device).options._timeout.total_seconds():g} s"  # type: ignore[attr-defined]
    except (RuntimeError, AttributeError):
        return "unknown"


def _add_sum(report: Report, group: dist.ProcessGroup, device: torch.device) -> None:
    size = dist.get_world_size(group)
    total = torch.tensor([dist.get_rank(group)], dtype=torch.long, device=device)
    start = time.perf_counter()
    dist.all_reduce(total, group=group)
    took = time.perf_counter() - start
    right = int(total) == size * (size - 1) // 2
    found = f"{took * 1e3:.1f} ms" if right else f"the sum of all ranks is {int(total)}"
    advice = "" if right else "run torch's own tests of the backend"
    report.add("all-reduce", "ok" if right else "fail", "", found, advice)


def _add_pairs(report: Report, group: dist.ProcessGroup, device: torch.device) -> None:
    size, me = dist.get_world_size(group), dist.get_rank(group)
    pairs = list(combinations(range(size), 2)) if size <= _ALL_PAIRS else [(i, i + 1) for i in range(size - 1)]
    mine = {pair: _there_and_back(pair, me, group, device) for pair in pairs if me in pair}
    rows = {p: r for theirs in all_gather_objects(mine, group) for p, r in theirs.items() if r is not None}
    broken = [pair for pair, (_, intact) in rows.items() if not intact]
    for a, b in broken:
        report.add("pairs", "fail", f"ranks {a} and {b}", "bytes came back changed", "look at the network between them")
    if rows and not broken:
        slow = min(rows, key=lambda p: rows[p][0])
        fast = max(rows, key=lambda p: rows[p][0])
        rates = f"{rows[slow][0]:.0f} to {rows[fast][0]:.0f} MB/s with 1 MiB; slowest: ranks {slow[0]} and {slow[1]}"
        report.add("pairs", "ok", f"{len(rows)} of ranks", rates)


def _there_and_back(
    pair: tuple[int, int], me: int, group: dist.ProcessGroup, device: torch.device
) -> tuple[float, bool] | None:
    """(MB/s, whether the bytes came back as they were) on the first of the pair."""
    sent = torch.arange(_BYTES, device=device).to(torch.uint8)
    back = torch.zeros_like(sent)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        if me == pair[0]:
            dist.send(sent, group=group, group_dst=pair[1])
            dist.recv(back, group=group, group_src=pair[1])
            best = min(best, time.perf_counter() - start)
        else:
            dist.recv(back, group=group, group_src=pair[0])
            dist.send(back, group=group, group_dst=pair[0])
    return (2 * _BYTES / best / 1e6, torch.equal(sent, back)) if me == pair[0] else None


def _add_clocks(report: Report, group: dist.ProcessGroup, device: torch.device) -> None:
    """Each rank's clock beside that of the first, by the quickest of five exchanges."""
    size, me = dist.get_world_size(group), dist.get_rank(group)
    skews = {}
    for other in range(1, size):
        if me not in (0, other):
            continue
        quickest, skew = float("inf"), 0.0
        for _ in range(5):
            stamp = torch.zeros(1, dtype=torch.double, device=device)
            if me == 0:
                start = time.time()
                dist.send(stamp, group=group, group_dst=other)
                dist.recv(stamp, group=group, group_src=other)
                end = time.time()
                if end - start < quickest:
                    quickest, skew = end - start, float(stamp) - (start + end) / 2
            else:
                dist.recv(stamp, group=group, group_src=0)
                dist.send(torch.full_like(stamp, time.time()), group=group, group_dst=0)
        skews[other] = skew
    skews = all_gather_objects(skews, group)[0]
    worst = max(skews, key=lambda r: abs(skews[r]), default=0)
    far = abs(skews.get(worst, 0.0))
    advice = "" if far < _SKEW else "let NTP or chrony set the clocks: logs of these ranks cannot be put in order"
    report.add("clocks", "ok" if far < _SKEW else "fail", f"rank {worst}", f"{far * 1e3:.1f} ms from rank 0", advice)


# -- the model -------------------------------------------------------------------------------------------------
def examine_model(report: Report, fm: FlexModel, inputs: dict[str, Any], *, reference: Reference = None) -> None:
    """Mesh, engines, ``check``, layouts and what hooks cost. Collective."""
    runtime = fm._runtime
    engines = ", ".join(runtime.engines.names) or "none"
    mesh = ", ".join(f"{a.name}={a.size} ({a.kind})" for a in runtime.whole.axes) or "one process"
    report.add("mesh", "ok", mesh, f"engines: {engines}; {len(fm.wrapped_module_names)} modules")
    covered = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if runtime.whole.size < covered:
        report.add(
            "mesh", "fail", mesh, f"{covered} processes run, and the model is over {runtime.whole.size}",
            "is the engine applied? else give FlexModel(mesh=)",
        )  # fmt: skip
    report.extend(fm.check(inputs, reference=reference, rtol=_PARITY).rows)
    _add_layouts(report, fm)
    _add_cost(report, fm, inputs)


def _add_layouts(report: Report, fm: FlexModel) -> None:
    known = [row for row in fm.sites() if row.layout]
    if fm._runtime.whole.axes:
        refused = sum(row.layout == "refused" for row in known)
        kinds: dict[str, int] = {}
        for row in known:
            kinds[row.layout] = kinds.get(row.layout, 0) + 1
        counts = "; ".join(f"{n} {kind}" for kind, n in sorted(kinds.items(), key=lambda pair: -pair[1]))
        advice = 'see the rows "layouts"' if refused else ""
        report.add("sites", "ok", f"{len(known)} sites", counts, advice)


def _add_cost(report: Report, fm: FlexModel, inputs: dict[str, Any]) -> None:
    """A forward with every module captured beside one without hooks."""
    hooks = len(fm.hooks())
    with torch.no_grad():
        plain = _median(lambda: fm(**inputs))
        with fm.capture("**", unpack_idx="all", deliver="main"):
            captured = _median(lambda: fm(**inputs))
    count = len(fm.wrapped_module_names)
    found = f"a forward takes {plain * 1e3:.1f} ms, with all {count} modules captured {captured * 1e3:.1f} ms"
    left = len(fm.hooks()) - hooks
    report.add("hooks", "fail" if left else "ok", f"{hooks} registered", found, f"{left} hooks stayed" if left else "")


def _median(run: Callable[[], Any], times: int = 5) -> float:
    run()
    took = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        took.append(time.perf_counter() - start)
    return sorted(took)[times // 2]
