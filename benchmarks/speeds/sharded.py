"""Part ``sharded``: one large activation that two ranks hold halves of, captured whole on the first."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from cells import cell, spread, table

SHAPE = (8, 512, 4096)
HALF = (8, 512, 2048)


class Half(nn.Module):
    """Puts out this rank's half, as a layer that is split over its columns does."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view_as(x)


def _mine() -> Tensor:
    import torch.distributed as dist

    return torch.randn(HALF, generator=torch.Generator().manual_seed(dist.get_rank()))


def _timed(run: Any, rounds: int) -> list[float]:
    """Seconds of each round on this rank, from when both are there."""
    import torch.distributed as dist

    times = []
    for _ in range(rounds + 2):  # the first find layouts and memory
        dist.barrier()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times[2:]


def _right(found: Tensor | None) -> bool:
    halves = [torch.randn(HALF, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
    return found is None or torch.equal(found, torch.cat(halves, -1))


def ours(*, rounds: int, **_: Any) -> Any:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    from flex_model import FlexModel, HookFunction
    from payload import Payload

    torch.set_num_threads(1)
    x, output = _mine(), dict[str, list[Tensor]]()
    fm = FlexModel(nn.Sequential(Half()), output, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    fm.register_forward_hook(HookFunction("0", layout={"tp": Shard(2)}))

    @torch.no_grad()
    def run() -> None:
        output.clear()
        fm(x)

    times = _timed(run, rounds)
    with Payload() as moved:
        run()
    right = _right(output["0"][0] if dist.get_rank() == 0 else None)
    return {"times": times, "right": right, "bytes": moved.bytes, "local": x.nbytes}


def older(*, rounds: int, **_: Any) -> Any:
    from speeds.older import FlexModel, HookFunction

    torch.set_num_threads(1)
    x, output = _mine(), dict[str, list[Tensor]]()
    fm = FlexModel(nn.Sequential(Half()), output, 2, 1, 1)
    fm.register_forward_hook(HookFunction("0", (None, None, SHAPE[-1])))

    @torch.no_grad()
    def run() -> None:
        output.clear()
        fm(x)

    times = _timed(run, rounds)
    return {"times": times, "right": _right(output["0"][0] if output.get("0") else None)}


def bare(*, rounds: int, **_: Any) -> Any:
    """The second rank's half, sent into memory that is there: what the bytes alone take."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    x, room = _mine(), torch.empty(HALF)

    def run() -> None:
        dist.recv(room, 1) if dist.get_rank() == 0 else dist.send(x, 0)

    return {"times": _timed(run, rounds), "right": True}


def report(options: Any) -> list[str]:
    import environments

    from speeds.hooks import tools

    tool = tools()["older"]
    pythons = {"ours": sys.executable, "older": environments.make(tool.folder, tool.needs), "bare": sys.executable}
    titles = {"ours": "FlexModel", "older": tool.title, "bare": "send and recv of the half alone"}
    found: dict[str, list[list[float]]] = {way: [] for way in pythons}
    told: Any = {}
    for _ in range(options.processes):
        for way, python in pythons.items():
            ranks = cell("speeds.sharded", way, ranks=2, python=python, rounds=options.rounds)
            assert all(rank["right"] for rank in ranks), way
            found[way].append([1000 * t for t in ranks[0]["times"]])
            told = ranks[1] if way == "ours" else told
    middle = {way: [sorted(times)[len(times) // 2] for times in runs] for way, runs in found.items()}
    rows = [["way", "ms on the first rank", "of 0.1.0"]]
    for way in pythons:
        ratios = [a / b for a, b in zip(middle[way], middle["older"], strict=True)]
        rows.append([titles[way], spread(middle[way], ".0f"), spread(ratios, ".2f")])
    moved = ", ".join(f"{name} {size:,}" for name, size in told["bytes"].items())
    return [
        "A sharded activation, whole on one rank",
        f"{SHAPE} in float32 over two ranks by gloo, delivered to the first; medians of {options.rounds} rounds in "
        f"each of {options.processes} pairs of fresh processes, by turns. Each rank holds {told['local']:,} bytes, and "
        f"the second one puts into operations in a round: {moved}.",
        "",
        *table(rows),
    ]
