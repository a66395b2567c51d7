"""``to_parquet`` and ``to_arrow``: a table with a column of fixed size lists for each site."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from flex_model.errors import StoreError
from flex_model.progress import progress_bar
from flex_model.store.export.selection import PLAIN, Rows, Selection, piece
from flex_model.store.export.shards import Exported, Shards
from flex_model.store.export.staging import Sink, staging
from flex_model.store.reader import ActivationStore

__all__ = ["arrow", "to_arrow", "to_parquet"]


def to_parquet(
    store: ActivationStore,
    path: str | Path,
    *,
    sites: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    rows: Any = None,
    dtype: Any = None,
    compression: Literal["none", "snappy", "zstd"] = "none",
    shard_bytes: int = 1 << 30,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Exported:
    """Write a folder of Parquet files: each site a column of fixed size lists, each side column one of numbers.

    >>> to_parquet(ActivationStore("acts"), "out", dtype="float32")                          # doctest: +SKIP
    >>> pyarrow.parquet.read_table("out"); datasets.load_dataset("parquet", data_dir="out")  # doctest: +SKIP

    A site of several dims is flattened, its shape in the field's metadata. A row group is at most 8 MiB. Parquet
    has neither bf16 nor fp8: give ``dtype``. The rest is as for ``to_safetensors``.
    """
    chosen = _select(store, sites, columns, rows, dtype, "Parquet")

    def opened(sink: Any, schema: Any) -> Any:
        from pyarrow import parquet

        return parquet.ParquetWriter(
            sink, schema, compression=compression, use_dictionary=False, write_statistics=list(chosen.columns)
        )

    return _export(chosen, path, "parquet", opened, shard_bytes, overwrite, progress)


def to_arrow(
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
    """Write a folder of Arrow IPC files (Feather 2), whose columns are those of ``to_parquet``; they can be mapped.

    >>> to_arrow(ActivationStore("acts"), "out", dtype="float32")                            # doctest: +SKIP
    >>> pyarrow.feather.read_table("out/data-00000-of-00001.arrow", memory_map=True)         # doctest: +SKIP

    The rest is as for ``to_parquet``.
    """
    chosen = _select(store, sites, columns, rows, dtype, "Arrow")
    return _export(chosen, path, "arrow", arrow().ipc.new_file, shard_bytes, overwrite, progress)


def arrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise StoreError("this export needs pyarrow; install flex-model[export].", page="not-installed") from None
    return pyarrow


def _select(store: ActivationStore, sites: Any, columns: Any, rows: Any, dtype: Any, what: str) -> Selection:
    arrow()
    return Selection.of(store, sites=sites, columns=columns, rows=rows, dtype=dtype, allowed=PLAIN, what=what)


def _export(
    selection: Selection,
    path: str | Path,
    kind: str,
    opened: Callable[[Any, Any], Any],
    shard_bytes: int,
    overwrite: bool,
    progress: bool | None,
) -> Exported:
    shards = Shards(len(selection.rows), selection.row_bytes, shard_bytes, kind)
    steps = sum(-(-(stop - start) // piece(selection.row_bytes)) for _, start, stop in shards.cuts)
    schema = _schema(selection)
    with staging(path, overwrite=overwrite) as folder:
        with progress_bar(steps, "exporting", progress) as tick:

            def write(sink: Sink, start: int, stop: int) -> None:
                with opened(arrow().PythonFile(sink, mode="w"), schema) as file:
                    for rows in selection.pieces(start, stop, row_bytes=selection.row_bytes):
                        file.write(_batch(selection, schema, rows))
                        tick()

            shards.write(folder, write)
        return shards.finish(folder, path, selection, kind=kind)


def _schema(selection: Selection) -> Any:
    pa = arrow()
    fields = [
        pa.field(name, pa.list_(_type(site.dtype), site.width), metadata={"shape": json.dumps(site.shape)})
        for name, site in selection.sites.items()
    ]
    fields += [pa.field(name, _type(column.dtype)) for name, column in selection.columns.items()]
    return pa.schema(fields, metadata={"flex_model": json.dumps(selection.store.about)})


def _type(dtype: str) -> Any:
    return arrow().bool_() if dtype == "bool" else getattr(arrow(), str(dtype))()


def _batch(selection: Selection, schema: Any, rows: Rows) -> Any:
    pa = arrow()
    arrays = []
    for name, site in selection.all.items():
        flat = pa.array(selection.read(name, rows).reshape(-1).numpy())
        arrays.append(flat if name in selection.columns else pa.FixedSizeListArray.from_arrays(flat, site.width))
    return pa.record_batch(arrays, schema=schema)
