"""How fast activations go to disk and come back, beside what else there is: all ways in every round, the best of each.

    python benchmarks/store.py --folder /tmp
    python benchmarks/store.py --folder /tmp --sites 30 --pieces 120

bf16 in pieces of 8 MiB, 2,048 columns, made to last by fsync where the way lets one; with one site they are then read
in 64 batches of random rows from the page cache. ``plain`` appends to one file, without checksums; ``safetensors`` has
all of it in memory first. CPU is that of all threads of this process, the system's part of it too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
import torch

from flex_model.store import ActivationStore, StoredSite, StoreWriter

WIDTH, STEP_ROWS = 2048, 2048


Way = Callable[[Path, list[torch.Tensor]], Callable[[Any], Any]]


def plain(path: Path, steps: list[torch.Tensor]) -> Callable[[Any], Any]:
    with path.open("wb") as file:
        for step in steps:
            file.write(step.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return lambda rows: np.memmap(path, np.uint16, "r", shape=(STEP_ROWS * len(steps), WIDTH))[rows]


def store(sites: int, queue: int, *, owned: bool) -> Way:
    def write(path: Path, steps: list[torch.Tensor]) -> Callable[[Any], Any]:
        names = [f"x{number}" for number in range(sites)]
        given = dict.fromkeys(names, StoredSite((WIDTH,), "bfloat16"))
        with StoreWriter.create(path, sites=given, queue_bytes=queue << 20) as writer:
            for step in range(len(steps) // sites):
                mine = steps[step * sites : (step + 1) * sites]
                writer.append(step, dict(zip(names, mine, strict=True)), owned=owned)
            writer.commit(step)
        return ActivationStore(path)["x0"].__getitem__

    return write


def tensorstore(path: Path, steps: list[torch.Tensor]) -> Callable[[Any], Any]:
    import tensorstore as ts

    little = {"name": "bytes", "configuration": {"endian": "little"}}
    crc = {"name": "crc32c"}
    inner = {"chunk_shape": [64, WIDTH], "codecs": [little, crc], "index_codecs": [little, crc]}
    grid = {"name": "regular", "configuration": {"chunk_shape": [STEP_ROWS, WIDTH]}}
    metadata = {
        "shape": [STEP_ROWS * len(steps), WIDTH],
        "data_type": "bfloat16",
        "chunk_grid": grid,
        "codecs": [{"name": "sharding_indexed", "configuration": inner}],
    }
    kvstore = {"driver": "file", "path": f"{path}/"}
    array = ts.open({"driver": "zarr3", "kvstore": kvstore, "metadata": metadata}, create=True).result()
    futures = [
        array[n * STEP_ROWS : (n + 1) * STEP_ROWS].write(step.view(torch.uint16).numpy().view(ml_dtypes.bfloat16))
        for n, step in enumerate(steps)
    ]
    for future in futures:
        future.result()
    return lambda rows: array[rows].read().result()


def zarr_python(path: Path, steps: list[torch.Tensor]) -> Callable[[Any], Any]:
    """bf16 as uint16, which zarr-python has; it does not fsync."""
    import zarr

    shape = (STEP_ROWS * len(steps), WIDTH)
    given = {"shards": (STEP_ROWS, WIDTH), "chunks": (64, WIDTH), "compressors": None, "dtype": "uint16"}
    array = zarr.create_array(str(path), shape=shape, **given)
    for n, step in enumerate(steps):
        array[n * STEP_ROWS : (n + 1) * STEP_ROWS] = step.view(torch.uint16).numpy()
    return lambda rows: array.get_orthogonal_selection((rows,))


def safetensors_file(path: Path, steps: list[torch.Tensor]) -> Callable[[Any], Any]:
    """One file, written at the end; of random rows it reads one slice each."""
    safetensors.numpy.save_file({"x": torch.cat(steps).view(torch.uint16).numpy()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    opened = safetensors.safe_open(path, "np").get_slice("x")
    return lambda rows: np.concatenate([opened[int(row) : int(row) + 1] for row in rows])


NEEDS = {"tensorstore": "tensorstore", "zarr-python": "zarr"}


def measure(way: Way, folder: str, steps: list[torch.Tensor], batches: Any) -> tuple[float, float, float]:
    """Seconds to write, of them on the CPU, and to read the batches."""
    inside = Path(tempfile.mkdtemp(dir=folder))
    start, cpu = time.perf_counter(), time.process_time()
    read = way(inside / "acts", steps)
    middle, cpu = time.perf_counter(), time.process_time() - cpu
    for batch in batches:
        found = read(batch)
        assert found.shape == (256, WIDTH)
    end = time.perf_counter()
    if len(batches):
        right = torch.cat([steps[row // STEP_ROWS][row % STEP_ROWS][None] for row in batches[-1]])
        assert (np.asarray(found).view(np.uint16) == right.view(torch.uint16).numpy()).all()
    shutil.rmtree(inside)
    return middle - start, cpu, end - middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--queue", type=int, default=128, help="MiB that may wait to be written")
    parser.add_argument("--sites", type=int, default=1)
    parser.add_argument("--pieces", type=int, default=128, help="a multiple of the sites")
    args = parser.parse_args()
    distinct = [torch.randn(STEP_ROWS, WIDTH).bfloat16() for _ in range(32)]
    steps = [distinct[number % 32] for number in range(args.pieces)]
    batches = np.random.default_rng(0).integers(0, STEP_ROWS * args.pieces, (64 if args.sites == 1 else 0, 256))
    ours = {
        "store": store(args.sites, args.queue, owned=False),
        "store, owned": store(args.sites, args.queue, owned=True),
    }
    other = {"tensorstore": tensorstore, "zarr-python": zarr_python, "safetensors": safetensors_file}
    ways = {"plain": plain, **ours, **other}
    ways = {name: way for name, way in ways.items() if find_spec(NEEDS.get(name, "os"))}
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            times[name].append(measure(way, args.folder, steps, batches))
    mib = args.pieces * STEP_ROWS * WIDTH * 2 / 2**20
    print(
        f"{args.sites} sites, {mib:,.0f} MiB, best of {args.rounds}; load average {os.getloadavg()[0]:.1f}\n"
        "| way | write, MiB/s | CPU seconds a GB | random rows, MiB/s |\n|---|---|---|---|"
    )
    for name, each in times.items():
        write, cpu, rows = (min(column) for column in zip(*each, strict=True))
        read = f"{batches.size * WIDTH * 2 / 2**20 / rows:,.0f}" if batches.size else ""
        print(f"| {name} | {mib / write:,.0f} | {cpu / mib * 1e9 / 2**20:.2f} | {read} |")


if __name__ == "__main__":
    main()
