"""A store in a bucket, against a server of S3 on this machine (moto). Each side is a process of its own: tensorstore's
threads end a process that forks, as these tests do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

MISSING = [name for name in ("tensorstore", "moto", "flask", "ml_dtypes", "xxhash") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")

WRITE = """
import sys
from stores import COLUMNS, SITES, append
from flex_model.store import StoreWriter

url, mode, stop, commit = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "commit"
if mode == "create":
    writer = StoreWriter.create(url, sites=SITES, columns=COLUMNS, segment_bytes=600)
else:
    writer = StoreWriter.resume(url, segment_bytes=600)
for step in range(writer.next_step, stop):
    append(writer, step, 0)
    if commit and (step % 3 == 2 or step == stop - 1):
        writer.commit(step)
writer.close(drop=True)
"""

READ = """
import sys
from stores import check_equal, expected
from flex_model.store import RowDataset

store = check_equal(sys.argv[1], expected(int(sys.argv[2]), 1))
whole = expected(int(sys.argv[2]), 1)
assert (store["heads"][[7, 3, -1]] == whole["heads"][[7, 3, -1]].numpy()).all()
data = RowDataset(store, batch_size=4, block=3, buffer=2, drop_last=False)
assert sorted(row for batch in data for row in batch["rows"].tolist()) == list(range(len(store)))
from flex_model.store.place import open_place
kept = {s.data for s in store._index.segments}
assert len(sys.argv) < 4 or {n for n in open_place(sys.argv[1]).listing("segments") if n.endswith("/c/0/0")} == kept
print(len(store), store.about["torch"])
"""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + 60
    try:
        while True:
            try:
                urllib.request.urlopen(urllib.request.Request(f"{url}/acts", method="PUT"), timeout=5)
                break
            except (urllib.error.URLError, ConnectionError):
                assert time.monotonic() < until and server.poll() is None, "moto's server does not answer"
                time.sleep(0.2)
        yield url
    finally:
        server.kill()
        server.wait()


def run(endpoint: str, code: str, *args: str, fails: bool = False) -> str:
    paths = [str(Path(__file__).parent), *filter(None, sys.path)]
    keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_EC2_METADATA_DISABLED": "true"}
    env = {**os.environ, **keys, "AWS_ENDPOINT_URL": endpoint, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code, *args], env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr if fails else done.stdout


def test_write_resume_and_read(endpoint: str) -> None:
    url = "s3://acts/runs/first"
    run(endpoint, WRITE, url, "create", "5", "commit")
    run(endpoint, WRITE, url, "resume", "9", "no commit")
    assert run(endpoint, READ, url, "5").split()
    run(endpoint, WRITE, url, "resume", "12", "commit")
    assert int(run(endpoint, READ, url, "12", "nothing else").split()[0]) > 40


def test_no_such_bucket_or_store(endpoint: str) -> None:
    told = run(endpoint, WRITE, "s3://acts/none", "resume", "1", "x", fails=True)
    assert "StoreError: s3://acts/none/ is no store" in told
    told = run(endpoint, WRITE, "s3://no-such-bucket/x", "create", "1", "x", fails=True)
    assert "StoreError: s3://no-such-bucket/x/ cannot be " in told
