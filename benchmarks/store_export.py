"""What an export costs in time and memory, by format, for a store and for one four times as large.

    python benchmarks/store_export.py --folder /tmp

bf16 rows of 2,048 numbers from the page cache, in contexts of 128; out as float16 (safetensors as stored), made to last
by fsync. Memory is the most that the process holds of its own beyond what it held before, files that it maps left out.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flex_model.store import ActivationStore, RowDataset, StoredSite, StoreWriter
from flex_model.store.export import Batches, to_arrow, to_parquet, to_saelens, to_safetensors

WIDTH, CONTEXT, STEP = 2048, 128, 2048  # a step is 8 MiB
WAYS: dict[str, Callable[[ActivationStore, Path], Any]] = {
    "safetensors": lambda store, path: to_safetensors(store, path),
    "Parquet": lambda store, path: to_parquet(store, path, dtype="float16"),
    "Arrow": lambda store, path: to_arrow(store, path, dtype="float16"),
    "SAELens": lambda store, path: to_saelens(store, path, dtype="float16"),
    "Batches, float32": lambda store, path: [batch.shape for batch in batches(store)],
}


def batches(store: ActivationStore) -> Batches:
    return Batches(RowDataset(store, sites=["x"], batch_size=1024, buffer=32), epochs=1)


def written(path: Path, steps: int) -> ActivationStore:
    columns = {"positions": torch.arange(STEP) % CONTEXT, "token_ids": torch.arange(STEP)}
    kinds, about = dict.fromkeys(columns, "int64"), {"context_size": CONTEXT}
    draw = torch.Generator().manual_seed(0)
    with StoreWriter.create(path, sites={"x": StoredSite((WIDTH,), "bfloat16")}, columns=kinds, about=about) as writer:
        for step in range(steps):
            writer.append(step, {"x": torch.randn(STEP, WIDTH, generator=draw).bfloat16()}, columns=columns)
        writer.commit(steps - 1)
    return ActivationStore(path)


def anonymous() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def measured(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and MiB."""
    ctypes.CDLL(None).malloc_trim(0)
    before, peak, over = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            peak[0] = max(peak[0], anonymous() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    over.set()
    thread.join()
    return seconds, peak[0] / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--steps", type=int, default=32, help="of 8 MiB, in the smaller store")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        at = Path(folder)
        first = written(at / "first", 1)
        for store in [written(at / str(steps), steps) for steps in (given.steps, 4 * given.steps)]:
            size = len(store) * WIDTH * 2 / 2**20
            for name, way in WAYS.items():
                way(first, at / "out")  # loads what it needs
                shutil.rmtree(at / "out", ignore_errors=True)
                seconds, memory = measured(lambda way=way, store=store: way(store, at / "out"))
                print(f"{size:6.0f} MiB  {name:17s} {size / seconds:6.0f} MiB/s  {memory:5.0f} MiB of memory")
                shutil.rmtree(at / "out", ignore_errors=True)


if __name__ == "__main__":
    main()
