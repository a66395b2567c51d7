"""What a writer is made of: statistics, the queue, buffers, and rows that are handed over."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from flex_model.errors import StoreError
from flex_model.store import ActivationStore, StoredSite, StoreWriter
from flex_model.store.buffers import Buffers
from flex_model.store.dtypes import row_bytes
from flex_model.store.moments import Sums
from flex_model.store.queue import WriteQueue

np = pytest.importorskip("numpy")
pytest.importorskip("ml_dtypes")
pytest.importorskip("xxhash")

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.int32, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 100, 2048, 5000])
def test_sums_are_numpys(dtype: torch.dtype, width: int) -> None:
    """By pieces of any length, which end within a line and within a block."""
    rows = (torch.randn(700, width) * 3 + torch.arange(width) % 5).to(dtype)
    sums, at = Sums(width), 0
    for size in [1, 2, 300, 0, 64, 333]:
        sums.add(rows[at : at + size])
        at += size
    assert at == len(rows)
    whole, found = rows.double().numpy(), sums.moments()
    assert (found.count == 700).all()
    np.testing.assert_allclose(found.mean, whole.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.std, whole.std(0), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sums_far_from_zero(dtype: torch.dtype) -> None:
    """A mean far above the spread, as some columns of real activations have; a column that never changes."""
    rows = torch.randn(4000, 3, dtype=torch.float64) * 16 + torch.tensor([3000.0, -1000.0, 0.0])
    rows[:, 2] = 0.1
    rows, sums = rows.to(dtype), Sums(3)
    sums.add(rows)
    found, whole = sums.moments(), rows.double().numpy()
    np.testing.assert_allclose(found.std[:2], whole.std(0)[:2], rtol=1e-9)
    assert found.std[2] < 1e-9


def test_sums_of_infinities(recwarn: pytest.WarningsRecorder) -> None:
    sums = Sums(2)
    sums.add(torch.tensor([[1.0, float("inf")], [3.0, 0.0]], dtype=torch.bfloat16))
    found = sums.moments()
    assert found.mean[0] == 2 and found.std[0] == 1 and not np.isfinite(found.mean[1]) and np.isnan(found.std[1])
    assert not recwarn.list


def test_a_queue_keeps_the_order_of_a_key() -> None:
    queue, done = WriteQueue(100), list[tuple[int, int]]()
    alone = {key: threading.Lock() for key in range(3)}

    def work(key: int, number: int) -> None:
        assert alone[key].acquire(blocking=False)  # never two of one key
        time.sleep(0.0005)
        done.append((key, number))
        alone[key].release()

    for number in range(60):
        queue.put(number % 3, lambda n=number: work(n % 3, n))
    queue.wait()
    queue.stop()
    assert sorted(done) == sorted((n % 3, n) for n in range(60))
    assert all([n for k, n in done if k == key] == list(range(key, 60, 3)) for key in range(3))


def test_work_that_goes_on_keeps_its_room() -> None:
    queue, gate, seen = WriteQueue(10), threading.Event(), list[int]()
    queue.reserve(10)
    queue.put("a", lambda: ("b", lambda: (gate.wait(), seen.append(queue.bytes))[1]), reserved=10)
    time.sleep(0.05)
    assert queue.bytes == 10 and not seen
    gate.set()
    queue.reserve(10)
    assert seen == [10]
    queue.put("a", lambda: None, reserved=10)
    queue.wait()
    assert queue.bytes == 0
    queue.stop()


def test_a_queue_that_is_dropped_does_no_more() -> None:
    queue, gate, done = WriteQueue(10, threads=1), threading.Event(), list[int]()
    queue.put(0, lambda: (gate.wait(), done.append(0))[1])
    for number in range(1, 5):
        queue.put(0, lambda n=number: done.append(n))
    time.sleep(0.05)
    ending = threading.Thread(target=lambda: queue.stop(drop=True))
    ending.start()
    time.sleep(0.05)
    gate.set()
    ending.join()
    assert done == [0]


def test_buffers() -> None:
    buffers, mib = Buffers(3 << 20), 1 << 20
    first = buffers.take(mib)
    buffers.give(first)
    assert buffers.take(mib // 2) is first  # up to twice as large
    buffers.give(first)
    assert buffers.take(mib // 2 - 1) is not first and buffers.take(mib + 1) is not first
    second, third = buffers.take(2 * mib), buffers.take(mib)
    assert third is first
    buffers.give(second)
    buffers.give(third)
    buffers.give(np.empty(mib, np.uint8))  # more than are kept
    assert buffers.take(2 * mib) is second and buffers.take(mib) is third and buffers._kept == 0
    small = buffers.take(1000)
    buffers.give(small)
    assert buffers._kept == 0


def _views() -> dict[str, Any]:
    rows = torch.arange(600.0).view(50, 12)
    return {
        "whole": rows,
        "columns": torch.arange(1200.0).view(50, 24)[:, 3:15],
        "transposed": rows.view(12, 50).T,
        "expanded": torch.arange(12.0).expand(50, 12),
        "array": rows.numpy(),
        "strided array": np.arange(1200.0, dtype=np.float32).reshape(50, 24)[:, ::2],
        "with a gradient": rows.clone().requires_grad_(),
    }


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("kind", _views())
def test_rows_of_any_form(tmp_path: Path, kind: str, owned: bool) -> None:
    rows = _views()[kind]
    with StoreWriter.create(tmp_path / "acts", sites={"x": StoredSite((3, 4))}) as writer:
        for step in range(3):
            writer.append(step, {"x": rows.reshape(50, 3, 4) if kind == "array" else rows}, owned=owned)
        writer.commit(2)
    read = ActivationStore(tmp_path / "acts")["x"].torch().view(150, 12)
    assert torch.equal(read, torch.as_tensor(rows).detach().repeat(3, 1))


def test_owned_rows_are_not_copied_and_let_go() -> None:
    rows, out = torch.arange(600.0).view(50, 12), np.empty(2400, np.uint8)
    assert row_bytes(rows, dtype="float32").ctypes.data == rows.data_ptr()
    assert row_bytes(rows.numpy(), dtype="float32").ctypes.data == rows.data_ptr()
    copied = row_bytes(rows, dtype="float32", out=out)
    assert copied.ctypes.data == out.ctypes.data and copied.tobytes() == rows.numpy().tobytes()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("owned", [False, True])
def test_rows_of_a_gpu(tmp_path: Path, owned: bool) -> None:
    """On it, and copied from it to pinned memory."""
    rows = torch.randn(2000, 64, device="cuda").bfloat16()
    pinned = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows, non_blocking=True)
    torch.cuda.synchronize()
    with StoreWriter.create(tmp_path / "acts", sites={"x": StoredSite((64,), "bfloat16")}) as writer:
        writer.append(0, {"x": rows}, owned=owned)
        writer.append(1, {"x": pinned}, owned=owned)
        writer.commit(1)
    assert torch.equal(ActivationStore(tmp_path / "acts")["x"].torch(), torch.cat([rows, rows]).cpu())


def test_a_writer_that_is_dropped_ends_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits is not written first."""
    from flex_model.store.segment import SegmentWriter

    put, written = SegmentWriter.append, list[int]()
    monkeypatch.setattr(
        SegmentWriter, "append", lambda self, rows: (time.sleep(0.05), written.append(len(rows)), put(self, rows))[2]
    )
    writer = StoreWriter.create(tmp_path / "acts", sites={"x": StoredSite((8,))})
    for step in range(100):
        writer.append(step, {"x": torch.zeros(10, 8)})
    writer.close(drop=True)
    assert len(written) < 20
    with pytest.raises(StoreError, match="is closed"):
        writer.append(100, {"x": torch.zeros(10, 8)})
