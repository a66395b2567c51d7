"""Exports: what other libraries read is what the store holds; a target is there as a whole or not at all."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from stores import COLUMNS, expected
from test_store import write
from test_store_failures import small_disk  # noqa: F401
from torch import Tensor

from flex_model.errors import RowError, StoreError
from flex_model.store import ActivationStore, StoredSite, StoreWriter
from flex_model.store.export import Exported, selection, staging, tables, to_arrow, to_parquet, to_safetensors
from flex_model.store.export import safetensors as of_safetensors
from flex_model.store.export.selection import Selection

np = pytest.importorskip("numpy")
pytest.importorskip("ml_dtypes")
pytest.importorskip("xxhash")
pyarrow = pytest.importorskip("pyarrow")

FORMATS = {"safetensors": to_safetensors, "parquet": to_parquet, "arrow": to_arrow}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    path = tmp_path_factory.mktemp("store") / "acts"
    write(path, 20, parts=2)
    return ActivationStore(path)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_PIECE", 500)  # bytes: 5 rows or so


def read(made: Exported) -> dict[str, Tensor]:
    """All of an export, by the library of its format."""
    if made.format == "safetensors":
        from safetensors.torch import load_file

        each = [load_file(made.path / name) for name in made.files]
        return {name: torch.cat([part[name] for part in each]) for name in each[0]}
    from pyarrow import feather, parquet

    if made.format == "parquet":
        table = parquet.read_table(made.path)  # the folder, whose index it must pass over
    else:
        table = pyarrow.concat_tables([feather.read_table(made.path / name) for name in made.files])
    return {field.name: column(table, field) for field in table.schema}


def column(table: Any, field: Any) -> Tensor:
    values = table[field.name].combine_chunks()
    if not pyarrow.types.is_fixed_size_list(field.type):
        return torch.from_numpy(values.to_numpy(zero_copy_only=False).copy())
    shape = json.loads(field.metadata[b"shape"])
    return torch.from_numpy(values.flatten().to_numpy(zero_copy_only=False).copy()).reshape(-1, *shape)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [None, "float32", torch.float16, "bfloat16"])
@pytest.mark.parametrize("shard_bytes", [1500, 1 << 30])
def test_equals_the_store(store: ActivationStore, tmp_path: Path, kind: str, dtype: Any, shard_bytes: int) -> None:
    if kind != "safetensors" and dtype in (None, "bfloat16"):
        with pytest.raises(StoreError, match=r"(Parquet|Arrow) has no bfloat16, which 'mlp' is; give dtype='float32'"):
            FORMATS[kind](store, tmp_path / "out", dtype=dtype)
        return
    made = FORMATS[kind](store, tmp_path / "out", dtype=dtype, shard_bytes=shard_bytes)
    whole = expected(20, 2)
    into = None if dtype is None else getattr(torch, str(dtype).removeprefix("torch."))
    found = read(made)
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(found[name], value if into is None or name in COLUMNS else value.to(into)), name
    assert made.rows == len(store) and (len(made.files) == 1) == (shard_bytes > 1500)
    assert made.bytes == sum((made.path / name).stat().st_size for name in made.files)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rows", [slice(3, 90, 7), [9, 2, 2, -1], range(60, 3, -2), range(4, 40), slice(5, 5)])
def test_some_rows_sites_and_columns(store: ActivationStore, tmp_path: Path, kind: str, rows: Any) -> None:
    made = FORMATS[kind](store, tmp_path / "out", sites=["heads"], columns=["label"], rows=rows, shard_bytes=700)
    whole, found = expected(20, 2), read(made)
    assert set(found) == {"heads", "label"}
    at = list(range(len(store)))[rows] if isinstance(rows, slice) else [r % len(store) for r in rows]
    for name, value in found.items():
        assert torch.equal(value, whole[name][at])
    assert made.rows == len(at)


def test_files_are_of_one_row_at_least(store: ActivationStore, tmp_path: Path) -> None:
    made = to_safetensors(store, tmp_path / "out", rows=slice(5), shard_bytes=1)
    assert len(made.files) == 5 and torch.equal(read(made)["mlp"], store["mlp"].torch(slice(5)))


def test_the_index_tells_who_has_which_rows(store: ActivationStore, tmp_path: Path) -> None:
    made = to_safetensors(store, tmp_path / "out", shard_bytes=1500)
    told = json.loads((tmp_path / "out" / "index.json").read_text())
    assert [file["name"] for file in told["files"]] == list(made.files)
    assert told["about"] == store.about and told["sites"]["heads"] == {"shape": [4, 3], "dtype": "float32"}
    from safetensors.torch import load_file

    for file in told["files"]:
        first, stop = file["rows"]
        assert torch.equal(load_file(made.path / file["name"])["mlp"], store["mlp"].torch(slice(first, stop)))


def test_every_dtype_in_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from flex_model.store.dtypes import DTYPES

    sites = {name: StoredSite((3,), name) for name in DTYPES}
    whole = {name: (torch.arange(15).reshape(5, 3) % 2).to(getattr(torch, name)) for name in DTYPES}
    with StoreWriter.create(tmp_path / "acts", sites=sites) as writer:
        writer.append(0, whole)
        writer.commit(0)
    made = to_safetensors(ActivationStore(tmp_path / "acts"), tmp_path / "out")
    found = load_file(made.path / made.files[0])
    for name, value in whole.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), name


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8_into_what_others_have(tmp_path: Path, name: str) -> None:
    whole = torch.randn(40, 3).to(getattr(torch, name))
    with StoreWriter.create(tmp_path / "acts", sites={"x": StoredSite((3,), name)}) as writer:
        writer.append(0, {"x": whole})
        writer.commit(0)
    store = ActivationStore(tmp_path / "acts")
    for into in ("float16", "float32"):
        made = to_parquet(store, tmp_path / into, dtype=into)
        assert torch.equal(read(made)["x"], whole.to(getattr(torch, into)))


def test_other_readers(store: ActivationStore, tmp_path: Path) -> None:
    """pandas, and the Parquet loader of datasets."""
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    made = to_parquet(store, tmp_path / "out", dtype="float32", shard_bytes=4000, compression="zstd")
    whole = expected(20, 2)
    table = pandas.read_parquet(made.path)
    assert np.array_equal(np.stack(table["mlp"]), whole["mlp"].float().numpy())
    found = datasets.load_dataset("parquet", data_dir=str(made.path), cache_dir=str(tmp_path / "cache"), split="train")
    assert np.array_equal(np.array(found["mlp"][:]), whole["mlp"].float().numpy())
    assert found["token_ids"][:] == whole["token_ids"].tolist()


def test_a_store_without_rows(tmp_path: Path) -> None:
    with StoreWriter.create(tmp_path / "acts", sites={"x": StoredSite((2,))}) as writer:
        writer.commit(0)
    for kind, export in FORMATS.items():
        made = export(ActivationStore(tmp_path / "acts"), tmp_path / kind)
        assert made.rows == 0 and read(made)["x"].shape == (0, 2)


@pytest.mark.filterwarnings("ignore:invalid value")  # of statistics of what is infinite
def test_a_value_beyond_the_range(tmp_path: Path) -> None:
    rows = torch.tensor([[1.0, 2.0], [7e4, -8e4], [float("inf"), float("nan")]])
    with StoreWriter.create(tmp_path / "acts", sites={"x": StoredSite((2,))}) as writer:
        writer.append(0, {"x": rows})
        writer.commit(0)
    store = ActivationStore(tmp_path / "acts")
    with pytest.raises(StoreError, match=r"'x': 2 values of 3 rows from row 0 on are beyond the range of float16"):
        to_safetensors(store, tmp_path / "out", dtype="float16")
    assert os.listdir(tmp_path) == ["acts"]
    kept = read(to_safetensors(store, tmp_path / "out", dtype="float16", rows=[0, 2]))["x"]
    assert torch.equal(kept.isinf(), rows[[0, 2]].isinf()) and torch.equal(kept.isnan(), rows[[0, 2]].isnan())


def test_bad_arguments(store: ActivationStore, tmp_path: Path) -> None:
    cases = [
        ({"sites": ["none"]}, RowError, "'none' is none of the store's: mlp, heads, token_ids, label"),
        ({"sites": ["token_ids"]}, StoreError, "'token_ids' is no site of the store; its sites: mlp, heads"),
        ({"columns": ["mlp"]}, StoreError, "'mlp' is no column of the store; its columns: token_ids, label"),
        ({"sites": []}, StoreError, r"expected sites, each once, got \[\]"),
        ({"sites": ["mlp", "mlp"]}, StoreError, "each once"),
        ({"rows": [10_000]}, RowError, "expected rows below"),
        ({"rows": range(10_000)}, RowError, "expected rows below"),
        ({"rows": "all"}, RowError, "expected an int, a slice or a list"),
        ({"dtype": "int8"}, StoreError, "expected a dtype of float16, bfloat16, float32, float64, got 'int8'"),
        ({"shard_bytes": 0}, StoreError, "expected shard_bytes from 1, got 0"),
    ]
    for given, kind, match in cases:
        for export in FORMATS.values():
            with pytest.raises(kind, match=match):
                export(store, tmp_path / "out", **{"dtype": "float32", **given})
    with pytest.raises(StoreError, match=r"goes to a folder of this machine, got 's3://bucket/out'"):
        to_parquet(store, "s3://bucket/out", dtype="float32")
    assert os.listdir(tmp_path) == []


@contextmanager
def counted(bars: list[list[int]], total: int, what: str, progress: bool) -> Iterator[Callable[..., None]]:
    """In place of ``progress_bar``: how many steps were announced and taken."""
    assert what == "exporting" and progress
    bars.append([total, 0])

    def tick() -> None:
        bars[-1][1] += 1

    yield tick


@pytest.mark.parametrize("kind", FORMATS)
def test_progress_ends_where_it_should(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    bars: list[list[int]] = []
    for module in (of_safetensors, tables):
        monkeypatch.setattr(module, "progress_bar", partial(counted, bars))
    FORMATS[kind](store, tmp_path / "out", dtype="float32", shard_bytes=1500, progress=True)
    ((total, done),) = bars
    assert total == done > 20


def fail_at(monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException) -> None:
    calls, read = [], Selection.read

    def failing(self: Selection, name: str, rows: Any) -> Tensor:
        calls.append(name)
        if len(calls) == call:
            raise error
        return read(self, name, rows)

    monkeypatch.setattr(Selection, "read", failing)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), OSError(5, "Input/output error")])
def test_an_error_leaves_nothing(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, error: BaseException
) -> None:
    made = FORMATS[kind](store, tmp_path / "kept", dtype="float32", rows=slice(4))
    before = read(made)
    with monkeypatch.context() as patch:
        fail_at(patch, 20, error)
        with pytest.raises(type(error) if not isinstance(error, OSError) else StoreError) as told:
            FORMATS[kind](store, tmp_path / "out", dtype="float32", shard_bytes=1500)
        assert not isinstance(error, OSError) or "out cannot be written: Input/output error; nothing was left" in str(
            told
        )
        fail_at(patch, 20, error)
        with pytest.raises((type(error), StoreError)):
            FORMATS[kind](store, tmp_path / "kept", dtype="float32", overwrite=True)
    assert os.listdir(tmp_path) == ["kept"]
    assert all(torch.equal(before[name], value) for name, value in read(made).items())
    assert read(FORMATS[kind](store, tmp_path / "kept", dtype="float32", overwrite=True))["mlp"].shape == (
        len(store),
        8,
    )
    assert os.listdir(tmp_path) == ["kept"]


def _export_slowly(source: str, target: str, kind: str, overwrite: bool, reads: Any) -> None:
    real = Selection.read

    def slow(self: Selection, name: str, rows: Any) -> Tensor:
        reads.release()
        time.sleep(0.02)
        return real(self, name, rows)

    Selection.read = slow  # type: ignore[method-assign]
    FORMATS[kind](ActivationStore(source), target, dtype="float32", shard_bytes=1500, overwrite=overwrite)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_kill_leaves_nothing_that_looks_whole(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "acts", 20, parts=2)
    store, reads = ActivationStore(tmp_path / "acts"), multiprocessing.get_context("fork").Semaphore(0)
    out = tmp_path / "out"
    for overwrite in (False, True):
        args = (str(tmp_path / "acts"), str(out), kind, overwrite, reads)
        child = multiprocessing.get_context("fork").Process(target=_export_slowly, args=args)
        child.start()
        for _ in range(12):  # some files are finished
            assert reads.acquire(timeout=60)
        with pytest.raises(StoreError, match=r"another process is exporting to .*out; wait for it") as told:
            FORMATS[kind](store, out, dtype="float32", overwrite=True)
        assert told.value.page == "export-exists"
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert out.exists() == overwrite and (tmp_path / ".out.partial").is_dir()
        if overwrite:
            (index,) = [path for path in out.iterdir() if path.name.endswith("index.json")]
            assert json.loads(index.read_text())["rows"] == 4  # the one before
        FORMATS[kind](store, out, dtype="float32", rows=slice(4), overwrite=overwrite)
        assert sorted(os.listdir(tmp_path)) == ["acts", "out"]
        assert not (out / ".lock").exists()


def test_a_kill_between_two_renames(store: ActivationStore, tmp_path: Path) -> None:
    made = to_safetensors(store, tmp_path / "out", rows=slice(4))
    made.path.rename(tmp_path / ".out.replaced")  # as it is then: the old one waits, the new one is not yet there
    with pytest.raises(StoreError, match="out is there already; give overwrite=True"):
        to_safetensors(store, tmp_path / "out")
    assert len(read(made)["mlp"]) == 4 and os.listdir(tmp_path) == ["out"]
    to_safetensors(store, tmp_path / "other", rows=slice(2)).path.rename(tmp_path / ".out.replaced")  # after both
    assert len(read(to_safetensors(store, tmp_path / "out", overwrite=True))["mlp"]) == len(store)
    assert os.listdir(tmp_path) == ["out"]


def test_what_is_no_export_is_not_overwritten(store: ActivationStore, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("years")
    to_safetensors(store, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name in ("mine", "file", "link"):
        with pytest.raises(StoreError, match=f"{name} is there already") as told:
            to_safetensors(store, tmp_path / name)
        with pytest.raises(StoreError, match=f"{name} is no export"):
            to_safetensors(store, tmp_path / name, overwrite=True)
        assert told.value.page == "export-exists"
    assert (tmp_path / "mine" / "thesis.tex").read_text() == (tmp_path / "file").read_text() == "years"
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "mine", "real"]


def test_full_disk(small_disk: Path, tmp_path: Path) -> None:  # noqa: F811
    with StoreWriter.create(tmp_path / "acts", sites={"x": StoredSite((256,))}) as writer:
        writer.append(0, {"x": torch.randn(4000, 256)})  # 4 MB, and 2 MiB on the disk
        writer.commit(0)
    store = ActivationStore(tmp_path / "acts")
    for kind, export in FORMATS.items():
        match = f"{kind} cannot be written: No space left on device; nothing was left there"
        with pytest.raises(StoreError, match=match) as told:
            export(store, small_disk / kind, shard_bytes=1 << 19)
        assert told.value.page == "store-place" and os.listdir(small_disk) == []
        export(store, small_disk / kind, rows=slice(1000))
        subprocess.run(["rm", "-r", str(small_disk / kind)], check=True)


def test_a_read_only_disk(small_disk: Path, store: ActivationStore) -> None:  # noqa: F811
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StoreError, match="out cannot be written: Read-only file system"):
        to_safetensors(store, small_disk / "out")


def test_a_damaged_store_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "acts", 8)
    store = ActivationStore(tmp_path / "acts")
    (tmp_path / "acts" / store._index.segments[-1].data).unlink()
    for export in FORMATS.values():
        with pytest.raises(StoreError, match="cannot be read: No such file"):
            export(store, tmp_path / "out", dtype="float32")
    assert os.listdir(tmp_path) == ["acts"]


def anonymous() -> int:
    """Bytes of this process's own memory; what it maps of files is the disk's."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class Peak:
    """The most memory in a block beyond what there was before it."""

    def __enter__(self) -> Peak:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that would be used again
        self.before = self.most = anonymous()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.most = max(self.most, anonymous())

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = self.most - self.before


@pytest.mark.parametrize("kind", FORMATS)
def test_memory_does_not_grow_with_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(selection, "_PIECE", 1 << 20)
    rows, size = torch.randn(8192, 512), 8  # 16 MiB
    with StoreWriter.create(tmp_path / "acts", sites={"x": StoredSite((512,))}) as writer:
        for step in range(size):
            writer.append(step, {"x": rows})
            writer.commit(step)
    store = ActivationStore(tmp_path / "acts")
    FORMATS[kind](store, tmp_path / "first", rows=slice(100))
    with Peak() as export:
        FORMATS[kind](store, tmp_path / "out", shard_bytes=1 << 40)
    with Peak() as whole:
        assert len(store["x"].torch()) == size * len(rows)
    assert export.bytes < 24 << 20 and whole.bytes > 100 << 20


def test_without_pyarrow(store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(StoreError, match=r"needs pyarrow; install flex-model\[export\]"):
        to_parquet(store, tmp_path / "out")
    assert to_safetensors(store, tmp_path / "out").rows == len(store)


def test_the_lock_goes_with_its_folder(tmp_path: Path) -> None:
    """One that waited for the lock of an export that has just ended does not touch it."""
    with staging.staging(tmp_path / "out", overwrite=False) as folder:
        folder.write("index.json", {})
        (tmp_path / "copy").mkdir()
        os.link(tmp_path / ".out.partial" / ".lock", tmp_path / "copy" / ".lock")
        with (
            pytest.raises(StoreError, match="another process is exporting"),
            staging._locked(tmp_path / "copy", tmp_path / "out"),
        ):
            pass
    assert os.listdir(tmp_path / "out") == ["index.json"]
