"""Part ``model``: forwards alone, and the same forwards with a harvest of residuals."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from cells import cell, measured, spread, table
from harvests.given import batches, by_hand, error, load


def rounds(*, model: str | None, folder: str, device: str, size: dict[str, int], tokens: int, samples: int, length: int,
           sites: int, turns: int, threads: int) -> Any:  # fmt: skip
    """``[{way: {"wall": s, "cpu": s}}, ...]``, and how far the stored rows are from those of plain hooks."""
    from flex_model import FlexModel

    torch.set_num_threads(threads)
    plain = load(model, device=device, **size)
    layers = len(plain.model.layers)
    chosen = sorted({round((n + 1) * layers / min(sites, layers)) - 1 for n in range(min(sites, layers))})
    data, path, fm = batches(tokens, samples, length, device=device), Path(folder) / "acts", FlexModel(plain)

    def alone() -> None:
        with torch.no_grad():
            for batch in data:
                plain(**batch, use_cache=False)
        if device != "cpu":
            torch.cuda.synchronize()

    def harvest(some: Any = data) -> Any:
        return fm.harvest(some, fm.at("resid_post", chosen), path, stop=False)

    store = harvest(data[:2]).store
    off = max(error(store[name].torch(), rows) for name, rows in by_hand(plain, data[:2], chosen).items())
    shutil.rmtree(path)
    found, done = [], None
    for turn in range(turns + 1):  # the first one warms up
        one: dict[str, Any] = {}
        for way in (alone, harvest) if turn % 2 else (harvest, alone):
            with measured() as one[way.__name__]:
                done = way() or done
            shutil.rmtree(path, ignore_errors=True)
        found.append(one)
    name = torch.cuda.get_device_name() if device != "cpu" else device
    return {"rounds": found[1:], "error": off, "sites": len(chosen), "rows": done.rows, "bytes": done.bytes, "on": name}


def report(options: Any) -> list[str]:
    rows = [
        ["threads", "alone, tokens/s", "with the harvest, tokens/s", "slower by", "CPU s alone", "more by", "MiB/s"]
    ]
    errors = []
    for threads in (1, 2) if options.device == "cpu" else (1,):
        (found,) = cell(
            "harvests.model",
            "rounds",
            model=options.model,
            folder=options.folder,
            device=options.device,
            size={"layers": options.layers, "width": options.width},
            tokens=options.model_tokens,
            samples=options.samples,
            length=options.length,
            sites=options.sites,
            turns=options.rounds,
            threads=threads,
        )
        rates = {way: [found["rows"] / one[way]["wall"] for one in found["rounds"]] for way in ("alone", "harvest")}
        slower = [a / b - 1 for a, b in zip(rates["alone"], rates["harvest"], strict=True)]
        cpu = {way: [one[way]["cpu"] for one in found["rounds"]] for way in rates}
        more = [b / a - 1 for a, b in zip(cpu["alone"], cpu["harvest"], strict=True)]
        shown = [spread(rates[way], ",.0f") for way in rates]
        mib = found["bytes"] / 2**20 / found["rows"] * max(rates["harvest"])
        burnt = [spread(cpu["alone"], ".1f"), spread(more, "+.1%")]
        rows.append([threads, *shown, spread(slower, "+.1%"), *burnt, f"{mib:,.0f}"])
        errors.append(found["error"])
    what = options.model_name if options.model else f"A random Llama of {options.layers} layers of {options.width:,}"
    return [
        "Against the model alone",
        f"{what} on {found['on']}, {found['rows']:,} tokens in batches of {options.samples} x {options.length}, "
        f"{found['sites']} residual sites, `stop=False`; by turns in one process, everything from the first step to "
        f"the last commit. Stored rows are within {max(errors):.0e} of plain hooks' (of the norm).",
        "",
        *table(rows),
    ]
