"""Part ``smollm2``: the rows of a split model, and the memory of its ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from cells import cell, measured, table
from harvests.given import batches, load

WORLDS = {"tp": 3, "fsdp": 2}
SHORT = 10_000  # tokens of the run whose memory the long one's is compared with


# -- cells -----------------------------------------------------------------------------------------------------
def harvested(*, model: str, axis: str | None, path: str, tokens: int, samples: int, length: int, **_: Any) -> Any:
    """All residual sites, with what it took on this rank."""
    from flex_model import FlexModel

    torch.set_num_threads(1)
    fm = FlexModel(load(model, axis=axis))
    data = batches(tokens, samples, length)
    with measured() as took:
        done = fm.harvest(data, fm.at("resid_post"), path)
    return took | {"rows": done.rows, "sites": len(done.sites), "bytes": done.bytes}


def alone(*, model: str, axis: str, samples: int, length: int) -> Any:
    """What a few forwards took on this rank, without a harvest and all but without logits, which it does not make."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    split = load(model, axis=axis)
    rank, parts = (dist.get_rank(), dist.get_world_size()) if axis == "fsdp" else (0, 1)
    with measured() as took, torch.no_grad():
        for batch in batches(3 * samples * length, samples, length):
            split(input_ids=batch["input_ids"].tensor_split(parts)[rank], use_cache=False, logits_to_keep=1)
    return took


def compared(*, want: str, found: str) -> Any:
    """``{site: relative error}`` of one store's rows from another's, and whether the side columns are equal."""
    from flex_model.store import ActivationStore

    one, other = ActivationStore(want), ActivationStore(found)
    assert list(one.sites) == list(other.sites) and len(one) == len(other), (len(one), len(other))
    assert other.verify()
    apart = {}
    for site in one.sites:
        pairs = [(one[site].torch(rows).double(), other[site].torch(rows).double()) for rows in _pieces(len(one))]
        apart[site] = (sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs)).sqrt()
    ordered = all((one[c][:] == other[c][:]).all() for c in one.columns)
    return {"errors": {site: float(value) for site, value in apart.items()}, "ordered": bool(ordered)}


def _pieces(rows: int) -> list[slice]:
    return [slice(start, start + 4096) for start in range(0, rows, 4096)]


# -- the page --------------------------------------------------------------------------------------------------
def report(options: Any) -> list[str]:
    if options.model is None:
        return ["Split over processes", "Left out: there are no weights of SmolLM2 here."]
    folder = Path(options.folder)
    given = {"model": options.model, "samples": options.samples, "length": options.length}
    want = folder / "alone"
    (one,) = cell("harvests.smollm2", "harvested", axis=None, path=str(want), tokens=options.tokens, **given)
    rows, memory = [["ranks", "tokens/s", "largest relative error", "side columns"]], []
    rows.append(["one process", f"{one['rows'] / one['wall']:,.0f}", "", ""])
    for axis, ranks in WORLDS.items():
        given |= {"axis": axis, "ranks": ranks}
        short, long = (
            cell("harvests.smollm2", "harvested", path=str(folder / f"{axis}-{n}"), tokens=n, **given)
            for n in (min(SHORT, options.tokens // 2), options.tokens)
        )
        forwards = cell("harvests.smollm2", "alone", **given)
        found = str(folder / f"{axis}-{options.tokens}")
        (same,) = cell("harvests.smollm2", "compared", want=str(want), found=found)
        site, most = max(same["errors"].items(), key=lambda pair: pair[1])
        assert same["ordered"] and most < 1e-4, (site, most)
        rate = f"{long[0]['rows'] / long[0]['wall']:,.0f}"
        rows.append([f"{axis.upper()} over {ranks}", rate, f"{most:.1e} ({site})", "equal"])
        memory += [_memory(axis, rank, *runs) for rank, runs in enumerate(zip(forwards, short, long, strict=True))]
        for path in folder.glob(f"{axis}-*"):
            shutil.rmtree(path)
    shutil.rmtree(want)
    sizes = (min(SHORT, options.tokens // 2), options.tokens)
    head = [
        "rank",
        "before",
        "most, forwards alone",
        *(f"most, {n:,} tokens" for n in sizes),
        "difference",
        f"after {sizes[1]:,} tokens",
    ]
    return [
        "Split over processes",
        f"{options.model_name}, all {one['sites']} residual sites of {one['rows']:,} tokens in float32, "
        f"{one['bytes'] / 2**30:.1f} GiB, in batches of {options.samples} x {options.length}, one thread a process. "
        f"Rows are compared with those of one process, in their order.",
        "",
        *table(rows),
        "Memory of each rank in MiB, in processes of their own: the most from the first step to the last commit, by "
        "the kernel's high-water mark, which is set back once the model is loaded; and what is left afterwards.",
        "",
        *table([head, *memory]),
    ]


def _memory(axis: str, rank: int, alone: Any, short: Any, long: Any) -> list[str]:
    """MiB."""
    shown = [long["before"], alone["peak"], short["peak"], long["peak"]]
    more = f"{long['peak'] - short['peak']:+,.0f}"
    return [f"{axis.upper()} {rank}", *(f"{size:,.0f}" for size in shown), more, f"{long['after']:,.0f}"]
