"""``to_safetensors``: every site and column as one tensor a file, for any framework that reads safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from flex_model.progress import progress_bar
from flex_model.store.export.selection import Selection, piece, torch_dtype
from flex_model.store.export.shards import Exported, Shards
from flex_model.store.export.staging import Sink, staging
from flex_model.store.reader import ActivationStore

__all__ = ["to_safetensors"]

_CODES = {  # https://huggingface.co/docs/safetensors: what a header calls them
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
    "bool": "BOOL",
}


def to_safetensors(
    store: ActivationStore,
    path: str | Path,
    *,
    sites: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    rows: Any = None,
    dtype: Any = None,
    shard_bytes: int = 1 << 30,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Exported:
    """Write a folder of ``data-00000-of-00004.safetensors``, ... and ``index.json``, which says who has which rows.

    >>> to_safetensors(ActivationStore("acts"), "out", sites=["model.layers.3"])             # doctest: +SKIP
    >>> safetensors.torch.load_file("out/data-00000-of-00001.safetensors")["token_ids"]      # doctest: +SKIP

    Each file has rows that follow one another, of all sites ``(rows, ...)`` and side columns ``(rows,)``, by name.
    ``rows``: which, and in which order, as for ``store[site][rows]``; ``dtype``: of sites of floating point, as
    stored if None. Memory holds some 30 MiB whatever ``shard_bytes`` is. ``path`` is there when all is written, and
    not before. Raises StoreError where it is taken (``overwrite`` replaces an earlier export), a value is beyond the
    range of ``dtype``, or the disk fails.
    """
    selection = Selection.of(store, sites=sites, columns=columns, rows=rows, dtype=dtype)
    shards = Shards(len(selection.rows), selection.row_bytes, shard_bytes, "safetensors")
    with staging(path, overwrite=overwrite) as folder:
        with progress_bar(_steps(selection, shards), "exporting", progress) as tick:
            shards.write(folder, lambda sink, start, stop: _write(selection, sink, start, stop, tick))
        return shards.finish(folder, path, selection, kind="safetensors")


def _steps(selection: Selection, shards: Shards) -> int:
    counts = [stop - start for _, start, stop in shards.cuts]
    return sum(-(-count // piece(_bytes(selection, name))) for count in counts for name in selection.all)


def _bytes(selection: Selection, name: str) -> int:
    site = selection.all[name]
    return site.width * torch_dtype(site.dtype).itemsize


def _write(selection: Selection, sink: Sink, start: int, stop: int, tick: Callable[..., object]) -> None:
    """As safetensors' own ``save_file``, which would need all of a file in memory."""
    aligned = sorted(selection.all, key=lambda name: -torch_dtype(selection.all[name].dtype).itemsize)
    sink.write(_header(selection, aligned, stop - start))
    for name in aligned:
        for rows in selection.pieces(start, stop, row_bytes=_bytes(selection, name)):
            sink.write(selection.read(name, rows).reshape(-1).view(torch.uint8).numpy())
            tick()


def _header(selection: Selection, names: Sequence[str], count: int) -> bytes:
    """The size of the JSON in 8 bytes, and the JSON, filled up with spaces to a multiple of 8."""
    told: dict[str, Any] = {"__metadata__": {"flex_model": json.dumps(selection.store.about)}}
    at = 0
    for name in names:
        site = selection.all[name]
        size = count * prod(site.shape) * torch_dtype(site.dtype).itemsize
        offsets = [at, at := at + size]
        told[name] = {"dtype": _CODES[site.dtype], "shape": [count, *site.shape], "data_offsets": offsets}
    text = json.dumps(told).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
