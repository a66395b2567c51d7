"""How fast texts become batches of tokens, beside the tokenizer alone: all ways in every round, the best of each.

    python benchmarks/texts.py --tokenizer .models/smollm2

The texts are the modules of Python's standard library, a document a file. ``the tokenizer`` is one call of it on all of
them, to lists; ``in Rust`` is what it wraps, without lists.
"""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flex_model.texts import TokenBatches

ROUNDS = 5


def batches(source: Any, tokenizer: Any = None, **options: Any) -> int:
    made = TokenBatches(source, tokenizer, batch_size=32, **options)
    return sum(int(batch.attention_mask.sum()) for batch in made)


def ways(tokenizer: Any, texts: list[str], folder: Path) -> dict[str, Callable[[], int]]:
    import pyarrow
    from pyarrow import parquet

    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    parquet.write_table(pyarrow.table({"text": texts}), folder / "texts.parquet")
    parquet.write_table(pyarrow.table({"input_ids": ids}), folder / "ids.parquet")
    fast = tokenizer.backend_tokenizer
    return {
        "in Rust": lambda: sum(map(len, fast.encode_batch_fast(texts, add_special_tokens=False))),
        "the tokenizer": lambda: sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])),
        "texts in a list": lambda: batches(texts, tokenizer),
        "Parquet": lambda: batches(folder / "texts.parquet", tokenizer),
        "without a thread": lambda: batches(texts, tokenizer, prefetch=0),
        "a row a document": lambda: batches(texts, tokenizer, packing=False, overflow="split"),
        "ready tokens": lambda: batches(ids),
        "ready tokens, Parquet": lambda: batches(folder / "ids.parquet"),
    }


def main() -> None:
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenizer", default=".models/smollm2")
    tokenizer = AutoTokenizer.from_pretrained(parser.parse_args().tokenizer)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    print(f"{len(texts)} documents, {sum(map(len, texts)):,} characters")
    best: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        all_ways = ways(tokenizer, texts, Path(folder))
        for _ in range(ROUNDS):
            for name, way in all_ways.items():
                begun = time.perf_counter(), time.process_time()
                tokens = way()
                rates = tokens / (time.perf_counter() - begun[0]), tokens / (time.process_time() - begun[1])
                best[name] = max(best.get(name, rates)[0], rates[0]), max(best.get(name, rates)[1], rates[1])
    for name, (wall, cpu) in best.items():
        print(f"{name:24} {wall:12,.0f} tokens/s {cpu:12,.0f} tokens per second of CPU")


if __name__ == "__main__":
    main()
