"""How fast activations go to disk and come back, beside what else there is: all ways in every round, the best of each.

    python benchmarks/store.py --folder /tmp

256 MiB of bf16 in steps of 8 MiB, 2,048 columns, made to last by fsync where the way lets one, then read in 64
batches of random rows from the page cache. ``plain`` appends to one file, without checksums; ``safetensors`` has all
of it in memory first.
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

WIDTH, STEP_ROWS, STEPS = 2048, 2048, 32
MIB = WIDTH * STEP_ROWS * STEPS * 2 / 2**20
BATCHES = np.random.default_rng(0).integers(0, STEP_ROWS * STEPS, (64, 256))


def plain(path: Path, steps: list[torch.Tensor]) -> Callable[[Any], Any]:
    with path.open("wb") as file:
        for step in steps:
            file.write(step.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return lambda rows: np.memmap(path, np.uint16, "r", shape=(STEP_ROWS * STEPS, WIDTH))[rows]


def store(path: Path, steps: list[torch.Tensor]) -> Callable[[Any], Any]:
    with StoreWriter.create(path, sites={"x": StoredSite((WIDTH,), "bfloat16")}) as writer:
        for number, step in enumerate(steps):
            writer.append(number, {"x": step})
        writer.commit(STEPS - 1)
    return ActivationStore(path)["x"].__getitem__


def tensorstore(path: Path, steps: list[torch.Tensor]) -> Callable[[Any], Any]:
    import tensorstore as ts

    little = {"name": "bytes", "configuration": {"endian": "little"}}
    crc = {"name": "crc32c"}
    inner = {"chunk_shape": [64, WIDTH], "codecs": [little, crc], "index_codecs": [little, crc]}
    grid = {"name": "regular", "configuration": {"chunk_shape": [STEP_ROWS, WIDTH]}}
    metadata = {
        "shape": [STEP_ROWS * STEPS, WIDTH],
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

    shape = (STEP_ROWS * STEPS, WIDTH)
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


WAYS = {"plain": plain, "store": store, "tensorstore": tensorstore, "zarr-python": zarr_python}
NEEDS = {"tensorstore": "tensorstore", "zarr-python": "zarr"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    steps = [torch.randn(STEP_ROWS, WIDTH).bfloat16() for _ in range(STEPS)]
    right = torch.cat(steps).view(torch.uint16).numpy()[BATCHES[0]]
    ways = {n: w for n, w in {**WAYS, "safetensors": safetensors_file}.items() if find_spec(NEEDS.get(n, "os"))}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            folder = Path(tempfile.mkdtemp(dir=args.folder))
            start = time.perf_counter()
            read = way(folder / "acts", steps)
            middle = time.perf_counter()
            for batch in BATCHES:
                found = read(batch)
            times[name].append((middle - start, time.perf_counter() - middle))
            assert (np.asarray(read(BATCHES[0])).view(np.uint16) == right).all() and found.shape == (256, WIDTH)
            shutil.rmtree(folder)
    print(
        f"best of {args.rounds}; load average {os.getloadavg()[0]:.1f}\n"
        "| way | write, MiB/s | random rows, MiB/s |\n|---|---|---|"
    )
    for name, pairs in times.items():
        write, rows = (min(column) for column in zip(*pairs, strict=True))
        print(f"| {name} | {MIB / write:,.0f} | {BATCHES.size * WIDTH * 2 / 2**20 / rows:,.0f} |")


if __name__ == "__main__":
    main()
