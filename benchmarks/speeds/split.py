"""Part ``split``: a real model over three ranks, all its residuals, its neurons, and a steering edit."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cells import cell, spread, table

SAMPLES, LENGTH = 4, 128


def measure(*, model: str, rounds: int, **_: Any) -> Any:
    """Milliseconds on this rank by way and round, and how often ranks met in one forward of each way."""
    import torch.distributed as dist
    from harvests.given import load

    from flex_model import FlexModel, edits
    from payload import Payload

    torch.set_num_threads(1)
    plain = load(model, axis="tp")
    fm = FlexModel(plain)
    ids = torch.randint(0, 32000, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    middle = len(plain.model.layers) // 2
    act, width = plain.model.layers[middle].mlp.act_fn, plain.config.intermediate_size
    vector = torch.randn(width, generator=torch.Generator().manual_seed(1))
    mine = vector.chunk(dist.get_world_size())[dist.get_rank()]

    def forward() -> Tensor:
        return plain(input_ids=ids, use_cache=False).logits

    def captured(component: str) -> Callable[[], Any]:
        def run() -> Any:
            with fm.capture(fm.at(component), deliver="main") as acts:
                forward()
            return acts

        return run

    def by_hand() -> Tensor:
        handle = act.register_forward_hook(lambda m, a, out: out + mine)
        try:
            return forward()
        finally:
            handle.remove()

    def steered() -> Tensor:
        with fm.edit(f"model.layers.{middle}.mlp.act_fn", edits.add(vector)):
            return forward()

    ways: dict[str, Callable[[], Any]] = {
        "forward": forward,
        "residuals": captured("resid_post"),
        "neurons": captured("mlp_post"),
        "bytes": _bytes(plain.config.num_hidden_layers, (SAMPLES, LENGTH, width // dist.get_world_size())),
        "steered by hand": by_hand,
        "steered": steered,
    }
    with torch.no_grad():
        assert torch.equal(by_hand(), steered())
        met = {}
        for name, run in ways.items():
            run()
            with Payload() as moved:
                run()
            met[name] = [sum(moved.calls.values()), sum(moved.bytes.values())]
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, run in ways.items():
                dist.barrier()
                start = time.perf_counter()
                run()
                times[name].append(1000 * (time.perf_counter() - start))
    return {"times": times, "met": met}


def _bytes(count: int, shape: tuple[int, ...]) -> Callable[[], None]:
    """What the neurons' shards take alone: as many tensors, each sent to the first rank, into memory that is there."""
    import torch.distributed as dist

    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = [torch.randn(shape) for _ in range(count)]
    room = [torch.empty(shape) for _ in range(count * (ranks - 1))] if rank == 0 else []

    def run() -> None:
        if rank:
            works = [dist.isend(one, 0) for one in mine]
        else:
            works = [dist.irecv(into, 1 + i % (ranks - 1)) for i, into in enumerate(room)]
        for work in works:
            assert work is not None
            work.wait()

    return run


def report(options: Any) -> list[str]:
    if options.model is None:
        return ["A model over three ranks", "Left out: there are no weights of SmolLM2 here."]
    given = {"model": options.model, "rounds": options.rounds}
    runs = [cell("speeds.split", "measure", ranks=3, **given) for _ in range(options.processes)]
    times = [{way: sorted(t)[len(t) // 2] for way, t in run[0]["times"].items()} for run in runs]
    rows = [["way", "ms", "over the forward", "the second rank's operations", "bytes that it puts into them"]]
    for way, met in runs[0][1]["met"].items():
        over = [one[way] / one["forward"] - 1 for one in times if way not in ("forward", "bytes")]
        rows.append([way, spread([one[way] for one in times], ".0f"), spread(over, "+.1%") if over else ""])
        rows[-1] += [f"{number:,}" for number in met]
    alone = [(one["neurons"] - one["forward"]) / one["bytes"] for one in times]
    edit = [one["steered"] / one["steered by hand"] - 1 for one in times]
    return [
        "A model over three ranks",
        f"SmolLM2-135M in float32, {SAMPLES} x {LENGTH} tokens, transformers' tensor parallelism over gloo, one thread "
        f"a rank, three ranks on this machine's cores; medians of {options.rounds} rounds on the first rank, in "
        f"{options.processes} worlds. `residuals`: all 30, which every rank has; `neurons`: of all 30 MLPs, each rank "
        f"a third, whole on the first; `bytes`: the neurons' shards alone, by send and irecv; `steered`: a vector "
        f"added to the neurons of one layer.",
        "",
        *table(rows),
        f"What the neurons take beyond the forward is {spread(alone, '.2f')} of what their bytes take alone. The edit "
        f"takes {spread(edit, '+.1%')} more than a plain hook that adds the rank's own part of the vector.",
    ]
