"""Part ``hooks``: what a hook costs on one process, beside a hook of torch that does the same by hand."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

import torch

from cells import cell, spread, table

MODEL = "64 modules `x + 1` of (1, 1, 576) in float32, on one thread"
GROUP = 1000  # hooks
TORCH = ["torch==2.13.0", "transformers==4.57.6", "numpy"]  # newer ones have not what it imports


class Tool(NamedTuple):
    title: str
    needs: list[str]
    folder: str  # of its environment
    note: str = ""


def measure(*, way: str, rounds: int, packages: list[str], **_: Any) -> Any:
    """CPU microseconds a module call, in turn with hand-written hooks in the same process: medians over rounds."""
    from speeds.ways import MODULES, check, net

    torch.set_num_threads(1)
    x = torch.randn(1, 1, 576)
    bare = net()
    runs = {"bare": lambda: bare(x)}
    runs |= {f"hand {kind}": run for kind, run in check("by_hand", x).items()}
    runs |= check(way, x)
    if way == "flex_model":
        runs |= {"empty": _empty(x), "disabled": _disabled(x)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for _ in range(rounds):
            for name, run in runs.items():
                start = time.process_time_ns()
                run()
                times[name].append((time.process_time_ns() - start) / 1000 / MODULES)
    middle = {name: sorted(t[rounds // 10 :])[len(t[rounds // 10 :]) // 2] for name, t in times.items()}
    return {"times": middle, "versions": {p: version(p) for p in packages}}


def _empty(x: torch.Tensor) -> Callable[[], Any]:
    from speeds.ways import net

    hooked = net()
    for module in hooked:
        module.register_forward_hook(lambda m, a, out: None)
    return lambda: hooked(x)


def _disabled(x: torch.Tensor) -> Callable[[], Any]:
    """A model whose hooks are off, called as whoever it belongs to calls it."""
    from flex_model import FlexModel, HookFunction
    from speeds.ways import net

    model = net()
    fm = FlexModel(model, {})
    for name in fm.wrapped_module_names[1:]:
        fm.register_forward_hook(HookFunction(name))
    off = fm.groups("all", complement=True)
    off.__enter__()
    return lambda: (off, model(x))


def switched(*, rounds: int, hooks: int, **_: Any) -> Any:
    """Milliseconds to turn a group off, and on again: medians."""
    from torch import nn

    from flex_model import FlexModel, HookFunction

    fm, times = FlexModel(nn.Sequential(*(nn.Identity() for _ in range(hooks))), {}), []
    for i in range(hooks):
        fm.register_forward_hook(HookFunction(str(i)))
    for _ in range(rounds):
        start = time.perf_counter()
        with fm.groups("all", complement=True):
            middle = time.perf_counter()
        times.append((1000 * (middle - start), 1000 * (time.perf_counter() - middle)))
    return [sorted(one)[rounds // 2] for one in zip(*times, strict=True)]


def report(options: Any) -> list[str]:
    used = tools()
    found, failed = _measured(used, options)
    rows = [["way", "capture, us a call", "to hand-written", "edit, us a call", "to hand-written"]]
    for way, tool in used.items():
        if way in failed:
            rows.append([tool.title, f"no: {failed[way]}", "", "", ""])
            continue
        rows.append([tool.title])
        for kind in ("capture", "edit"):
            rows[-1].append(spread([one["times"][kind] for one in found[way]], ".1f"))
            rows[-1].append(spread([one["times"][kind] / one["times"][f"hand {kind}"] for one in found[way]], ".2f"))
    ours = [one["times"] for one in found["flex_model"]]
    by_hand = [spread([one[f"hand {kind}"] for one in ours], ".1f") for kind in ("capture", "edit")]
    rows.append(["hooks of torch, by hand", by_hand[0], "1", by_hand[1], "1"])
    for name, title in (("empty", "an empty hook of torch"), ("disabled", "FlexModel, hooks off")):
        rows.append([title, spread([one[name] for one in ours], ".1f"), "", "", ""])
    rows.append(["no hook", spread([one["bare"] for one in ours], ".1f"), "", "", ""])
    turned = [cell("speeds.hooks", "switched", rounds=50, hooks=GROUP)[0] for _ in range(options.processes)]
    off, on = (spread([one[i] for one in turned], ".2f") for i in range(2))
    versions = {way: ", ".join(f"{p} {v}" for p, v in found[way][0]["versions"].items()) for way in used if found[way]}
    return [
        "Hooks on one process",
        f"{MODEL}; CPU time of a module's call with its hook. By hand a captured value is detached and cloned, as by "
        f"FlexModel; nnsight, baukit, TransformerLens and pyvene keep the model's own tensors. Of each way "
        f"{options.processes} fresh processes, by turns; in each the way and hooks by hand alternate "
        f"({options.hook_rounds} rounds). What is captured, and what comes out of an edited model, is compared first.",
        "",
        *table(rows),
        f"A group of {GROUP:,} hooks is turned off in {off} ms, and on again in {on} ms.",
        "",
        *(f"* {used[way].title}: {told}" for way, told in versions.items()),
    ]


def tools() -> dict[str, Tool]:
    """By way; where the peers' lines of code are counted, their environments are the same."""
    from lines import TOOLS

    there = {way: TOOLS[way] for way in ("nnsight", "transformer_lens", "pyvene")}
    return {
        "flex_model": Tool("FlexModel", ["flex-model"], ""),
        "older": Tool("FlexModel 0.1.0, over gloo", ["flex-model==0.1.0", *TORCH], "older"),
        "nnsight": there["nnsight"],
        "baukit": Tool("baukit's logic, by hand", ["torch"], ""),
        "transformer_lens": there["transformer_lens"]._replace(title="TransformerLens's hook points"),
        "pyvene": there["pyvene"],
    }


def _measured(tools: dict[str, Tool], options: Any) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """What each process found, by way, and why a way cannot be run."""
    import environments

    found: dict[str, list[Any]] = {way: [] for way in tools}
    failed: dict[str, str] = {}
    for _ in range(options.processes):
        for way in [w for w in tools if w not in failed]:
            tool = tools[way]
            given = {"way": way, "rounds": options.hook_rounds, "packages": [tool.needs[0].partition("==")[0]]}
            try:
                python = environments.make(tool.folder, tool.needs) if tool.folder else sys.executable
                found[way] += cell("speeds.hooks", "measure", python=python, **given)
            except (subprocess.CalledProcessError, RuntimeError) as error:
                failed[way] = str(error).strip().rpartition("\n")[2][:200]
    return found, failed
