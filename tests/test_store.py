"""Stores: what was written is what is read, however it was split, and whenever the writer was stopped."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from stores import COLUMNS, SITES, append, check_equal, expected, rows_of, values
from worlds import run_world

from flex_model.errors import RowError, StoreError
from flex_model.store import ActivationStore, StoredSite, StoreWriter

np = pytest.importorskip("numpy")
pytest.importorskip("ml_dtypes")
pytest.importorskip("xxhash")


def create(path: Path, **more: Any) -> StoreWriter:
    return StoreWriter.create(path, sites=SITES, columns=COLUMNS, segment_bytes=600, **more)


def write(path: Path, steps: int, *, every: int = 4, parts: int = 1) -> None:
    with create(path) as writer:
        for step in range(steps):
            for part in range(parts):
                append(writer, step, part)
            if step % every == every - 1 or step == steps - 1:
                writer.commit(step)


def begin(path: str, rank: int, ranks: int, *, fresh: bool) -> StoreWriter:
    """As a job of several ranks does it."""
    first = StoreWriter.resume(path, ranks=ranks) if rank == 0 and not fresh else None
    first = create(Path(path), ranks=ranks) if rank == 0 and fresh else first
    dist.barrier()
    return first or StoreWriter.join(path, rank=rank, ranks=ranks, segment_bytes=600)


def world(path: str, parts: int, splits: int, steps: range, fresh: bool = True, publish: bool = True) -> list[int]:
    rank = dist.get_rank()
    writer = begin(path, rank, parts * splits, fresh=fresh)
    first = writer.next_step
    for step in range(first, steps.stop):
        append(writer, step, rank // splits, split=rank % splits, splits=splits)
        if step % steps.step == steps.step - 1 or step == steps.stop - 1:
            writer.commit(step)
            dist.barrier()
            if rank == 0 and publish:
                writer.publish(step)
    writer.close()
    return [first, writer.next_step]


@pytest.mark.parametrize("parts, splits", [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)])
def test_ranks_write_their_rectangles(tmp_path: Path, parts: int, splits: int) -> None:
    path = str(tmp_path / "acts")
    assert run_world(parts * splits, world, path, parts, splits, range(0, 10, 4)) == [[0, 10]] * (parts * splits)
    whole = expected(10, parts)
    store = check_equal(path, whole)
    for name in SITES:  # statistics are numpy's
        flat = whole[name].double().flatten(1).numpy()
        site = store[name]
        np.testing.assert_allclose(site.mean.flatten().numpy(), flat.mean(0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(site.std.flatten().numpy(), flat.std(0), rtol=1e-12)
        assert site.norm == pytest.approx(np.sqrt((flat**2).sum(1).mean()), rel=1e-12)
        assert site.mean.shape == SITES[name].shape


def test_other_ranks_go_on(tmp_path: Path) -> None:
    path = str(tmp_path / "acts")
    run_world(2, world, path, 2, 1, range(0, 8, 4))
    run_world(2, world, path, 2, 1, range(0, 11, 4), False, False)  # written by all, and never published
    assert ActivationStore(path).last_step == 7
    # the same parts by other ranks, with other columns
    assert run_world(4, world, path, 2, 2, range(0, 14, 4), False) == [[8, 14]] * 4
    check_equal(path, expected(14, 2))


def test_rows(tmp_path: Path) -> None:
    write(tmp_path / "acts", 12, parts=2)
    store, whole = ActivationStore(tmp_path / "acts"), expected(12, 2)
    site, heads = store["heads"], whole["heads"]
    assert site.shape == heads.shape and site.dtype == "float32" and len(site) == len(store) == len(heads)
    assert store["mlp"][:3].dtype.name == "bfloat16" and store["mlp"].torch(0).shape == (8,)
    assert (site[4] == heads[4].numpy()).all() and (site[-1] == heads[-1].numpy()).all()
    draw = random.Random(0)
    for rows in [[], [5, 1, 5, -2], draw.choices(range(len(heads)), k=200), list(range(20, 3, -1))]:
        assert torch.equal(site.torch(rows), heads[rows]) and (site[np.array(rows, int)] == heads[rows].numpy()).all()
        assert torch.equal(site.torch(torch.tensor(rows, dtype=torch.int64)), heads[rows])
    for cut in [slice(3, 50, 7), slice(None, None, -1), slice(-9, None), slice(5, 5)]:
        assert (site[cut] == heads.numpy()[cut]).all()
    assert (store.columns["token_ids"][:] == whole["token_ids"].numpy()).all()
    assert sum(len(store.step(s)) for s in range(12)) == len(store)
    assert torch.equal(site.torch(store.step(7)), torch.cat([values(7, p)[0]["heads"] for p in (0, 1)]))
    assert sum(1 for _ in site) == len(store)
    with pytest.raises(RowError, match=f"expected rows below {len(heads)}, got 5000"):
        site[[1, 5000]]
    with pytest.raises(RowError, match="a list of ints"):
        site[heads[:, 0, 0].numpy() > 0]
    with pytest.raises(RowError, match="'up' is none of the store's: mlp, heads, token_ids, label"):
        store["up"]


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.int32],
)
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = (torch.randn(50, 6) * 20).to(dtype)
    with StoreWriter.create(tmp_path / "acts", sites={"x": StoredSite((6,), dtype)}) as writer:
        writer.append(0, {"x": rows})
        writer.append(1, {"x": ActivationStore(tmp_path / "acts")["x"][:0]})  # an array, of no rows
        writer.commit(1)
    store = ActivationStore(tmp_path / "acts")
    read = store["x"].torch()
    assert read.dtype == dtype and torch.equal(read.view(torch.uint8), rows.view(torch.uint8))
    assert str(store["x"][0].dtype) == str(dtype).removeprefix("torch.")
    with StoreWriter.create(tmp_path / "again", sites={"x": StoredSite((6,), dtype)}) as writer:
        writer.append(0, {"x": store["x"][:]})
        writer.commit(0)
    assert torch.equal(ActivationStore(tmp_path / "again")["x"].torch().view(torch.uint8), rows.view(torch.uint8))


def test_appended_rows_may_be_reused(tmp_path: Path) -> None:
    rows = torch.ones(1000, 8)
    with StoreWriter.create(tmp_path / "acts", sites={"x": StoredSite((8,))}) as writer:
        for step in range(20):
            writer.append(step, {"x": rows.fill_(step)})
        writer.commit(19)
    assert ActivationStore(tmp_path / "acts")["x"][::1000][:, 0].tolist() == [float(s) for s in range(20)]


def test_other_readers_read_segments(tmp_path: Path) -> None:
    """A segment is a zarr array for tensorstore too. In a process of its own: tensorstore ends processes that fork."""
    pytest.importorskip("tensorstore")
    write(tmp_path / "acts", 6)
    code = """
import json, sys, tensorstore
from pathlib import Path
for folder in sorted(Path(sys.argv[1]).glob("segments/*/*")):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}
    array = tensorstore.open(spec).result()
    rows = array.read().result()
    site = json.loads((folder / "zarr.json").read_text())["attributes"]["site"]
    print(json.dumps([site, rows.astype("f8").tolist()]))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "acts")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    whole, found = expected(6, 1), dict[str, list[Any]]()
    for line in told.splitlines():
        site, rows = json.loads(line)
        found.setdefault(site, []).extend(rows)
    assert found.keys() == whole.keys()
    for site, rows in found.items():
        assert rows == whole[site].double().view(len(whole[site]), -1).tolist()


def test_readers_see_whole_commits_only(tmp_path: Path) -> None:
    path = tmp_path / "acts"
    with create(path) as writer:
        store = ActivationStore(path)
        assert len(store) == 0 and store.last_step == -1 and store["mlp"][:].shape == (0, 8)
        for step in range(12):
            append(writer, step, 0)
            assert len(ActivationStore(path)) == sum(rows_of(s, 0) for s in range(step // 3 * 3))
            if step % 3 == 2:
                writer.commit(step)
                seen = len(store)
                store.refresh()
                assert len(store) == len(expected(step + 1, 1)["mlp"]) > seen and store.last_step == step
    check_equal(path, expected(12, 1))


def _keep_writing(path: str, steps: int) -> None:
    writer = StoreWriter.resume(path, segment_bytes=600)
    for step in range(writer.next_step, steps):
        append(writer, step, 0)
        if step % 3 == 2 or step == steps - 1:
            writer.commit(step)
    writer.close()
    os._exit(0)


def test_killed_at_any_moment(tmp_path: Path) -> None:
    path, steps, draw = str(tmp_path / "acts"), 120, random.Random(5)
    create(tmp_path / "acts").close()
    kills, reached = 0, set()
    while kills < 40:
        child = multiprocessing.get_context("fork").Process(target=_keep_writing, args=(path, steps))
        child.start()
        before = ActivationStore(path).last_step
        until = time.monotonic() + draw.uniform(0, 0.03 + 0.01 * kills)  # also a slow machine gets on
        while child.is_alive() and time.monotonic() < until:
            time.sleep(0.001)
        child.kill()
        child.join()
        kills += child.exitcode == -signal.SIGKILL
        store = ActivationStore(path)
        reached.add(store.last_step)
        assert store.last_step >= before
        check_rows = expected(store.last_step + 1, 1) if store.last_step >= 0 else {}
        assert all(torch.equal(store[name].torch(), value) for name, value in check_rows.items())
        if child.exitcode == 0:
            break
    child = multiprocessing.get_context("fork").Process(target=_keep_writing, args=(path, steps))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert kills > 2 and len(reached) > 2  # it was stopped within, more than once
    check_equal(path, expected(steps, 1))
    named = {s.folder for s in ActivationStore(path)._index.segments}
    assert {p.parent.parent.parent.relative_to(path).as_posix() for p in Path(path).glob("segments/*/*/c/0/0")} == named


def test_a_step_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    writer = create(tmp_path / "acts")
    sites, columns = values(1, 0)
    writer.append(1, {"mlp": sites["mlp"]}, columns=columns)
    with pytest.raises(StoreError, match=r"step 1, part 0: 'heads' has columns none; expected 0 to 12, each once"):
        writer.commit(1)
    writer.close()
    writer = StoreWriter.resume(tmp_path / "acts", ranks=2)
    append(writer, 1, 0)
    writer.commit(1)
    with pytest.raises(StoreError, match=r"step 1: rank 1 has not committed"):
        writer.publish(1)
    other = StoreWriter.join(tmp_path / "acts", rank=1, ranks=2)
    append(other, 1, 0)
    other.commit(1)
    with pytest.raises(StoreError, match=r"'mlp' has columns 0 to 8, 0 to 8; expected 0 to 8, each once"):
        writer.publish(1)
    assert len(ActivationStore(tmp_path / "acts")) == 0
    writer.close()
    other.close()


def test_bad_arguments(tmp_path: Path) -> None:
    writer = create(tmp_path / "acts")
    rows = torch.zeros(3, 8, dtype=torch.bfloat16)
    writer.append(1, {"mlp": rows})
    for match, step, given in [
        ("'up' is none of the store's", 0, {"up": rows}),
        ("'mlp': expected dtype bfloat16, got float32; convert", 0, {"mlp": rows.float()}),
        (r"columns 0 to 8 of 8\), got shape \(3, 4\)", 1, {"mlp": rows[:, :4]}),
        (r"columns 2 to 4 of 8\), got shape \(3, 8\)", 1, {"mlp": (rows, slice(2, 4))}),
        ("expected a step from 0", -1, {"mlp": rows}),
        ("'heads' has 2 rows; expected it once, with 3 rows", 2, {"mlp": rows, "heads": torch.zeros(2, 4, 3)}),
        ("'mlp' has 3 rows; expected it once, with 3 rows", 1, {"mlp": rows}),
    ]:
        with pytest.raises(StoreError, match=match) as told:
            writer.append(step, given)
        assert told.value.page == "bad-argument"
    with pytest.raises(StoreError, match="expected to commit a step from 1, got 0"):
        writer.commit(0)
    with pytest.raises(StoreError, match=r"rows up to step 1 are not committed"):
        writer.close()
    writer.close(drop=True)
    with pytest.raises(StoreError, match="is closed"):
        writer.append(3, {"mlp": rows})
    with pytest.raises(StoreError, match="is a store already"):
        create(tmp_path / "acts")
    with pytest.raises(StoreError, match="is no store; make one"):
        StoreWriter.resume(tmp_path / "none")
    with pytest.raises(StoreError, match="is no store"):
        ActivationStore(tmp_path / "none")
    with pytest.raises(StoreError, match="a URL of s3, gs or file"):
        ActivationStore("http://somewhere/acts")
    with pytest.raises(StoreError, match="dtype 'complex64' cannot be stored"):
        StoredSite((3,), torch.complex64)


def test_url_of_a_folder_and_what_was_said(tmp_path: Path) -> None:
    url = (tmp_path / "a store").as_uri()
    with StoreWriter.create(url, sites={"x": StoredSite((2,), layout="tp=2")}, about={"model": "m"}) as writer:
        writer.append(3, {"x": torch.ones(2, 2)})
        writer.commit(3)
    store = ActivationStore(url)
    assert len(store) == 2 and store["x"].layout == "tp=2" and (tmp_path / "a store").is_dir()
    assert store.about["model"] == "m" and store.about["torch"] == torch.__version__


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    old = create(tmp_path / "acts")
    append(old, 0, 0)
    new = StoreWriter.resume(tmp_path / "acts")
    append(old, 1, 0)
    with pytest.raises(StoreError, match="another writer took this store over"):
        old.commit(1)
    old.close(drop=True)
    append(new, 0, 0)
    append(new, 1, 0)
    new.commit(1)
    new.close()
    check_equal(tmp_path / "acts", expected(2, 1))


def test_a_folder_that_is_no_store_keeps_what_is_in_it(tmp_path: Path) -> None:
    """Also files under the names that a store would remove what is not committed from."""
    for name in ("segments/mine.txt", "commits/mine.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("mine")
    for over_empty in (False, True):
        StoreWriter.create(tmp_path, sites={"x": StoredSite((2,))}, over_empty=over_empty).close()
        assert (tmp_path / "segments/mine.txt").read_text() == (tmp_path / "commits/mine.txt").read_text() == "mine"
        (tmp_path / "manifest.json").unlink()


def test_statistics_that_were_summed_elsewhere(tmp_path: Path) -> None:
    """By rows and by sums, in any order, they are those of all rows."""
    rows = torch.randn(40, 6, dtype=torch.float64) * torch.tensor([1, 10, 0.1, 1, 1, 1]) + torch.arange(6) * 100
    rows = rows.float()
    with StoreWriter.create(tmp_path / "acts", sites={"x": StoredSite((6,), "float32")}) as writer:
        for step, some in enumerate(rows.split(10)):
            wide = some.double()
            sums = {} if step % 2 == 0 else {"x": torch.stack([wide.sum(0), wide.square().sum(0)])}
            writer.append(step, {"x": some}, sums=sums)
        writer.commit(3)
    store = ActivationStore(tmp_path / "acts")
    assert torch.allclose(store["x"].mean, rows.double().mean(0), rtol=1e-9)
    assert torch.allclose(store["x"].std, rows.double().std(0, correction=0), rtol=1e-6)


def test_taken_over_within_publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that was halted while it joined the tables writes no commit of what the new one removed."""
    from flex_model.store import commits

    old, merge = create(tmp_path / "acts"), commits._merge
    append(old, 0, 0)
    news: list[StoreWriter] = []

    def taken(*args: Any) -> None:
        merge(*args)
        monkeypatch.undo()
        news.append(StoreWriter.resume(tmp_path / "acts"))

    monkeypatch.setattr(commits, "_merge", taken)
    with pytest.raises(StoreError, match="another writer took this store over"):
        old.commit(0)
    assert ActivationStore(tmp_path / "acts").last_step == -1
    old.close(drop=True)
    for step in range(2):  # the first has no rows
        append(news[0], step, 0)
    news[0].commit(1)
    news[0].close()
    check_equal(tmp_path / "acts", expected(2, 1))
