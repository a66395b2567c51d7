"""``breakpoint``: pdb on one rank in the middle of an edit, while the other ranks wait for it.

Unlike ``torch.distributed.breakpoint`` nobody waits in a collective: ranks look at the store, so that no timeout ends
the session, and a rank that dies in the debugger ends the wait.
"""

from __future__ import annotations

import hmac
import pdb
import secrets
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from types import FrameType
from typing import Any, TextIO

import torch.distributed as dist

from flex_model.errors import FlexModelError, PeerError

__all__ = ["breakpoint"]

_POLL, _BEAT, _SILENCE = 0.1, 1.0, 60.0  # seconds
_met: Counter[int] = Counter()  # breakpoints of each rank that this rank has passed


def breakpoint(rank: int = 0, *, port: int | None = None, timeout: float = 600.0) -> None:
    """Open pdb on ``rank`` in the caller's frame. All ranks that run this line wait until it continues.

    >>> def edit(x):                                    # doctest: +SKIP
    ...     flex_model.check.breakpoint(rank=1)
    ...     return x * 2

    pdb reads from this process's terminal (torchrun's workers have one, srun's with ``--pty``). ``port``: it listens
    on 127.0.0.1 instead, and prints a word that whoever connects has to send first (``nc 127.0.0.1 PORT``).
    ``timeout``: seconds within which ``rank`` must come here; then there is no limit. The session ends with
    ``continue``, and when the caller returns: what follows may need the other ranks. ``quit`` is a PeerError on all.
    """
    caller = sys._getframe(1)
    if not dist.is_available() or not dist.is_initialized():
        _debug(caller, port, lambda quitting: None)
        return
    _met[rank] += 1
    store = dist.distributed_c10d.PrefixStore(
        f"flex_model/breakpoint/{rank}/{_met[rank]}", dist.distributed_c10d._get_default_store()
    )
    if dist.get_rank() == rank:
        _lead(caller, port, store)
    else:
        _follow(rank, store, timeout)


# -- the rank that is debugged ---------------------------------------------------------------------------------
def _lead(caller: FrameType, port: int | None, store: Any) -> None:
    store.add("beat", 1)
    over = threading.Event()
    threading.Thread(target=_beat, args=(store, over), daemon=True).start()

    def release(quitting: bool) -> None:
        if not over.is_set():
            over.set()
            store.set("over", "quit" if quitting else "continue")

    try:
        _debug(caller, port, release)
    except BaseException:
        release(True)
        raise


def _beat(store: Any, over: threading.Event) -> None:
    while not over.wait(_BEAT):
        with suppress(RuntimeError):  # of a store that is gone, with the job
            store.add("beat", 1)


def _debug(caller: FrameType, port: int | None, release: Any) -> None:
    source, sink, closing = _terminal() if port is None else _loopback(port)
    _Debugger(source, sink, closing, release).set_trace(caller)


class _Debugger(pdb.Pdb):
    """pdb that tells when it is left, and leaves by itself where its first frame returns."""

    def __init__(self, source: TextIO, sink: TextIO, closing: Any, release: Any) -> None:
        super().__init__(stdin=source, stdout=sink, nosigint=True)
        self.use_rawinput = False
        self._closing, self._release = closing, release
        self._home: FrameType | None = None
        self._prompted = self._left = False

    def set_trace(self, frame: FrameType | None = None, **keywords: Any) -> None:
        self._home = frame
        super().set_trace(frame, **keywords)

    def interaction(self, *args: Any, **keywords: Any) -> None:
        self._prompted = True
        super().interaction(*args, **keywords)

    def dispatch_return(self, frame: FrameType, arg: Any) -> Any:
        if frame is not self._home:
            return super().dispatch_return(frame, arg)
        if not self._prompted:  # it was the function's last line
            super().dispatch_return(frame, arg)
        elif not self._left:
            self.message("The function returns: all ranks go on.")
        self._leave(False)
        self.set_continue()
        return None

    def do_continue(self, arg: str) -> Any:
        if not self.get_all_breaks():  # else the session goes on to the next of them, or to the function's end
            self._leave(False)
        return super().do_continue(arg)

    do_c = do_cont = do_continue

    def do_quit(self, arg: str) -> Any:
        self._leave(True)
        return super().do_quit(arg)

    do_q = do_exit = do_quit

    def do_EOF(self, arg: str) -> Any:
        return self.do_quit(arg)

    def _leave(self, quitting: bool) -> None:
        if self._left:
            return
        self._left = True
        self.clear_all_breaks()
        self._release(quitting)
        for stream in self._closing:
            with suppress(OSError):
                stream.close()


def _terminal() -> tuple[TextIO, TextIO, list[Any]]:
    try:
        source, sink = open("/dev/tty"), open("/dev/tty", "w")  # noqa: SIM115
    except OSError as error:
        raise FlexModelError(
            f"check.breakpoint: this process has no terminal ({error}); give port= and connect to it from here.",
            page="no-terminal",
        ) from error
    return source, sink, [source, sink]


def _loopback(port: int) -> tuple[TextIO, TextIO, list[Any]]:
    """The first connection from this machine that knows the word. Anybody on the machine can connect."""
    word = secrets.token_hex(8)
    server = socket.create_server(("127.0.0.1", port))
    print(f"pdb waits on 127.0.0.1:{server.getsockname()[1]}; send first: {word}", file=sys.stderr, flush=True)
    with server:  # it serves one session
        while True:
            connection, _ = server.accept()
            connection.settimeout(30.0)
            source = connection.makefile("r", encoding="utf-8", newline="\n")
            with suppress(OSError, UnicodeDecodeError):
                if hmac.compare_digest(source.readline(100).strip().encode(), word.encode()):
                    connection.settimeout(None)
                    sink = connection.makefile("w", buffering=1, encoding="utf-8")
                    return source, sink, [source, sink, connection]
            source.close()
            connection.close()


# -- the others ------------------------------------------------------------------------------------------------
def _follow(rank: int, store: Any, timeout: float) -> None:
    beats, heard = 0, time.monotonic()
    while not store.check(["over"]):
        time.sleep(_POLL)
        now = store.add("beat", 0)
        if now != beats:
            beats, heard = now, time.monotonic()
        silent = time.monotonic() - heard
        if not beats and silent > timeout:
            raise PeerError(f"check.breakpoint: rank {rank} has not come here within {timeout:g} s; does it run this?")
        if beats and silent > _SILENCE:
            raise PeerError(f"check.breakpoint: rank {rank} was in the debugger, and gives no sign of life any more.")
    if store.get("over") == b"quit":
        raise PeerError(f"check.breakpoint: rank {rank} has quit the debugger.")
