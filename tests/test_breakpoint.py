"""``check.breakpoint``: pdb on one rank of two, on a terminal and on a socket; the other rank waits and goes on."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SCRIPT = """
import sys, time
import torch, engines, models
import torch.distributed as dist
from worlds import run_world
from flex_model import FlexModel, check
from flex_model.errors import FlexModelError

def edit(x):
    secret = 41 + dist.get_rank()
    check.breakpoint(rank=1, port=PORT)
    secret += 1
    return x * 2

def work():
    fm = FlexModel(engines.place("tp", models.net()).model)
    try:
        with fm.edit("layers.0.mlp.act", edit), fm.capture("head") as acts:
            fm(models.tokens())
    except FlexModelError as error:
        return type(error).__name__
    return round(float(acts["head"].norm()), 4)

if __name__ == "__main__":
    print("results", run_world(2, work), flush=True)
"""


@contextmanager
def _terminal(tmp_path: Path, port: int | None) -> Iterator[int]:
    """The script on a terminal of its own, as torchrun's workers are on the user's."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("PORT", repr(port)))
    child, terminal = pty.fork()
    if child == 0:
        path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
        os.execve(sys.executable, [sys.executable, str(script)], {**os.environ, "PYTHONPATH": path, "TERM": "dumb"})
    try:
        yield terminal
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(terminal)


def _until(terminal: int, pattern: str, seconds: float = 120) -> str:
    """What the terminal shows up to a match."""
    text, deadline = "", time.monotonic() + seconds
    while not re.search(pattern, text):
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"{pattern!r} did not come; there is {text!r}"
        try:
            text += os.read(terminal, 4096).decode(errors="replace")
        except OSError:
            raise AssertionError(f"the script ended with {text!r}") from None
    return text


def _says(terminal: int, command: str, pattern: str) -> str:
    os.write(terminal, command.encode() + b"\n")
    return _until(terminal, pattern)


def _results(text: str) -> list[str]:
    found = re.search(r"results \[(.*)\]", text)
    assert found is not None, text
    return found[1].split(", ")


@pytest.mark.parametrize("leave", ["c", "n\nn\nn\nn"])
def test_on_a_terminal(tmp_path: Path, leave: str) -> None:
    with _terminal(tmp_path, None) as terminal:
        _until(terminal, r"\(Pdb\) ")
        assert "42" in _says(terminal, "p secret", r"42\r\n\(Pdb\) ")  # rank 1's
        assert "(4, 6, 16)" in _says(terminal, "p tuple(x.shape)", r"\)\r\n\(Pdb\) ")  # the whole value
        _says(terminal, "n", r"\(Pdb\) ")
        assert "43" in _says(terminal, "p secret", r"43\r\n\(Pdb\) ")
        one, other = _results(_says(terminal, leave, r"results \[.*\]"))
        assert one == other and float(one) > 0


def test_quit_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    with _terminal(tmp_path, None) as terminal:
        _until(terminal, r"\(Pdb\) ")
        results = _results(_says(terminal, "q", r"results \[.*\]"))
        assert results == ["'EditError'"] * 2


def test_on_a_socket_with_a_word(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with _terminal(tmp_path, port) as terminal:
        text = _until(terminal, r"send first: \w+\s")
        word = re.search(r"send first: (\w+)", text)[1]  # type: ignore[index]
        assert f"127.0.0.1:{port}" in text
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(b"open sesame\n")
            assert stranger.recv(100) == b""
        with socket.create_connection(("127.0.0.1", port)) as friend, friend.makefile("rw") as stream:
            stream.write(f"{word}\np secret\nc\n")
            stream.flush()
            assert "42" in stream.read()
        one, other = _results(_until(terminal, r"results \[.*\]"))
        assert one == other
