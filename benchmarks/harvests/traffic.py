"""Part ``traffic``: what goes from rank to rank in a harvest of a split model, beside the model's own."""

from __future__ import annotations

from typing import Any

import torch

from cells import cell, table
from harvests.given import batches, load
from harvests.smollm2 import WORLDS
from payload import Payload

SAMPLES, LENGTH, STEPS = 2, 25, [4, 8, 16]


def traffic(*, model: str, axis: str, path: str, steps: list[int]) -> Any:
    """Calls and bytes of so many forwards, and of harvests of as many steps: ``[[alone, harvest], ...]``."""
    import torch.distributed as dist

    from flex_model import FlexModel

    torch.set_num_threads(1)
    split = load(model, axis=axis)
    fm = FlexModel(split)
    rank, parts = (dist.get_rank(), dist.get_world_size()) if axis == "fsdp" else (0, 1)
    found = []
    for number in steps:
        data = batches(number * SAMPLES * LENGTH, SAMPLES, LENGTH)
        with Payload() as alone, torch.no_grad():
            for batch in data:
                split(input_ids=batch["input_ids"].tensor_split(parts)[rank], use_cache=False)
        with Payload() as harvest:
            fm.harvest(data, fm.at("resid_post"), f"{path}-{number}", stop=False)
        found.append([{"calls": dict(p.calls), "bytes": dict(p.bytes)} for p in (alone, harvest)])
    return found


# -- the page --------------------------------------------------------------------------------------------------
def report(options: Any) -> list[str]:
    title = "From rank to rank"
    if options.model is None:
        return [title, "Left out: there are no weights of SmolLM2 here."]
    rows = [row for axis in WORLDS for row in _messages(axis, WORLDS[axis], options)]
    return [
        title,
        f"{options.model_name}, all residual sites: what the first rank puts into operations of the process group in "
        f"forwards of {SAMPLES} x {LENGTH} tokens alone, and what harvests of as many steps add with `stop=False`. "
        f"These are messages by which ranks agree; the first harvest of a model also finds its layouts, under FSDP by "
        f"forwards of its own, and compares digests of values that ranks should hold alike.",
        "",
        *table([["ranks", "steps", "forwards: operations, MiB", "added by the harvest", "of these"], *rows]),
    ]


def _messages(axis: str, ranks: int, options: Any) -> list[list[Any]]:
    path = f"{options.folder}/{axis}-traffic"
    told = cell("harvests.traffic", "traffic", ranks=ranks, axis=axis, path=path, steps=STEPS, model=options.model)[0]
    rows = []
    for number, (alone, harvest) in zip(STEPS, told, strict=True):
        calls = {n: harvest["calls"][n] - alone["calls"].get(n, 0) for n in harvest["calls"]}
        size = {n: harvest["bytes"][n] - alone["bytes"].get(n, 0) for n in harvest["calls"]}
        forwards = f"{sum(alone['calls'].values()):,}, {sum(alone['bytes'].values()) / 2**20:,.0f}"
        added = f"{sum(calls.values()):,} operations, {sum(size.values()):,} bytes"
        each = "; ".join(f"{n} {c}: {size[n]:,}" for n, c in calls.items() if c or size[n])
        rows.append([f"{axis.upper()} over {ranks}", number, forwards, added, each])
    return rows
