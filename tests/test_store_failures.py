"""What goes wrong with disks and files: said, and never silent; what was committed stays readable."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stores import append, check_equal, expected
from test_store import create, write

from flex_model.errors import StoreError
from flex_model.store import ActivationStore, StoredSite, StoreWriter
from flex_model.store.queue import WriteQueue
from flex_model.store.segment import SegmentWriter

pytest.importorskip("numpy")
pytest.importorskip("ml_dtypes")
pytest.importorskip("xxhash")


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Of 2 MiB, or as a parameter says."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={getattr(request, 'param', '2m')}", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("needs root that may mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_full_disk(small_disk: Path) -> None:
    whole = torch.randn(1000, 64)
    writer = StoreWriter.create(small_disk / "acts", sites={"x": StoredSite((64,))})
    writer.append(0, {"x": whole})
    writer.commit(0)
    with pytest.raises(StoreError, match=r"cannot be written: No space left on device; what was committed") as told:
        for step in range(1, 100):
            writer.append(step, {"x": whole})
        writer.commit(99)
    assert told.value.page == "store-place"
    with pytest.raises(StoreError, match="No space left"):  # again, and not only once
        writer.append(100, {"x": whole})
    writer.close(drop=True)
    store = ActivationStore(small_disk / "acts")
    assert torch.equal(store["x"].torch(), whole) and store.verify() == 1
    with StoreWriter.resume(small_disk / "acts") as again:  # makes room by itself: what was not committed goes
        again.append(again.next_step, {"x": whole})
        again.commit(1)
    assert len(ActivationStore(small_disk / "acts")) == 2000


def test_read_only_disk(small_disk: Path) -> None:
    write(small_disk / "acts", 4)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StoreError, match="cannot be resumed: Read-only file system"):
        StoreWriter.resume(small_disk / "acts")
    with pytest.raises(StoreError, match="cannot be made a store: Read-only file system"):
        create(small_disk / "other")
    check_equal(small_disk / "acts", expected(4, 1))


def test_vanished_folder(tmp_path: Path) -> None:
    writer = create(tmp_path / "acts")
    for step in range(3):
        append(writer, step, 0)
    writer.commit(2)
    (tmp_path / "acts").rename(tmp_path / "moved")
    with pytest.raises(StoreError, match="is gone"):
        for step in range(3, 50):
            append(writer, step, 0)
            time.sleep(0.001)
        writer.commit(49)
    assert not (tmp_path / "acts").exists()
    writer.close(drop=True)
    check_equal(tmp_path / "moved", expected(3, 1))


def test_an_error_in_a_thread_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: SegmentWriter, rows: Any) -> None:
        raise RuntimeError("no such luck")

    writer = create(tmp_path / "acts")
    monkeypatch.setattr(SegmentWriter, "append", broken)
    with pytest.raises(StoreError, match="RuntimeError: no such luck"):
        append(writer, 1, 0)
        writer.commit(1)
    writer.close(drop=True)


def test_back_pressure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``append`` waits for a slow disk, memory stays within the queue, and nothing is dropped."""
    slow, put = threading.Event(), SegmentWriter.append
    monkeypatch.setattr(SegmentWriter, "append", lambda self, rows: (slow.wait(), put(self, rows))[1])
    rows, most = torch.arange(80.0).view(10, 8), 0
    writer = StoreWriter.create(tmp_path / "acts", sites={"x": StoredSite((8,))}, queue_bytes=1000)
    done = []

    def fill() -> None:
        for step in range(50):
            writer.append(step, {"x": rows + step})
            done.append(step)

    thread = threading.Thread(target=fill)
    thread.start()
    until = time.monotonic() + 10
    while len(done) < 3 and time.monotonic() < until:
        time.sleep(0.005)
    time.sleep(0.1)
    assert len(done) == 3 and writer.bytes_waiting == 960  # three of 320 bytes fit in 1000
    slow.set()
    while thread.is_alive():
        most = max(most, writer.bytes_waiting)
    writer.commit(49)
    writer.close()
    assert most <= 1000
    assert torch.equal(ActivationStore(tmp_path / "acts")["x"].torch(), torch.cat([rows + s for s in range(50)]))


def test_more_than_the_queue_goes_alone() -> None:
    queue, done = WriteQueue(10), []
    for number in range(5):
        queue.reserve(100)
        queue.put(0, lambda n=number: done.append((n, queue.bytes)), reserved=100)
    queue.wait()
    queue.stop()
    assert done == [(n, 100) for n in range(5)]


def test_flipped_bytes(tmp_path: Path) -> None:
    write(tmp_path / "acts", 8, every=8)  # of statistics only the last are read
    files = [
        p for p in sorted((tmp_path / "acts").rglob("*")) if p.is_file() and p.name not in ("zarr.json", "session.json")
    ]
    assert len(files) >= 8
    for path in files:
        good = path.read_bytes()
        for at in sorted({0, len(good) // 2, len(good) - 2}):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            with pytest.raises(StoreError) as told:
                ActivationStore(tmp_path / "acts").verify()
            assert told.value.page == "store-damaged" and str(path.relative_to(tmp_path / "acts")) in str(told.value)
        path.write_bytes(good)
    check_equal(tmp_path / "acts", expected(8, 1))


def test_a_shortened_segment(tmp_path: Path) -> None:
    write(tmp_path / "acts", 4, every=2)
    store = ActivationStore(tmp_path / "acts")
    lost, short = [tmp_path / "acts" / s.data for s in store._index.segments if s.site == "mlp"][:2]
    short.write_bytes(short.read_bytes()[:20])
    with pytest.raises(StoreError, match="is shorter than its"):
        store["mlp"][:]
    lost.unlink()
    with pytest.raises(StoreError, match=r"2 of \d+ segments are not what was written"):
        store.verify()
    assert torch.equal(store["heads"].torch(), expected(4, 1)["heads"])


def test_a_table_cannot_lead_out_of_the_store(tmp_path: Path) -> None:
    from flex_model.store.manifest import pack

    write(tmp_path / "acts", 2)
    (table,) = (tmp_path / "acts").glob("commits/*/done.json")
    body = json.loads(table.read_text())["body"]
    for folder in ["../outside", "segments/../../outside", "/etc", "segments/a/b/c", "segments/a/.."]:
        body["segments"][0]["folder"] = folder
        table.write_bytes(pack(body))
        with pytest.raises(StoreError, match="expected a folder in segments/"):
            ActivationStore(tmp_path / "acts")


def test_another_format(tmp_path: Path) -> None:
    from flex_model.store.manifest import pack

    write(tmp_path / "acts", 2)
    manifest = tmp_path / "acts" / "manifest.json"
    body = json.loads(manifest.read_text())["body"]
    manifest.write_bytes(pack({**body, "format": 2}))
    with pytest.raises(StoreError, match="has format 2, and this version reads 1"):
        ActivationStore(tmp_path / "acts")
    shutil.rmtree(tmp_path / "acts" / "commits")
