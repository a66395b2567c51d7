"""``serve``: the page, on 127.0.0.1 alone, for this machine's user."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from importlib.util import find_spec
from typing import Any, ClassVar

from flex_model.errors import FlexModelError
from flex_model.show.watch.reading import Run

__all__ = ["serve"]

_POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"  # plotly sets styles


def serve(run: Run, port: int = 0) -> ThreadingHTTPServer:
    """A server of the page about ``run``; ``serve_forever`` runs it, ``server_port`` is where. 0: any port."""
    if find_spec("plotly") is None:
        raise FlexModelError("the page's charts need plotly; install flex-model[plot].", page="not-installed")

    class Handler(_Handler):
        pages: ClassVar = {
            "/": ("text/html", lambda: _asset("page.html")),
            "/page.css": ("text/css", lambda: _asset("page.css")),
            "/page.js": ("text/javascript", lambda: _asset("page.js")),
            "/plotly.js": ("text/javascript", _plotly),
            "/state": ("application/json", lambda: json.dumps(run.state())),
        }

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise FlexModelError(
            f"port {port} cannot be had ({error.strerror}); give another --port, or 0 for any.", page="bad-argument"
        ) from error


class _Handler(BaseHTTPRequestHandler):
    pages: ClassVar[dict[str, tuple[str, Callable[[], str]]]]

    def do_GET(self) -> None:
        host = (self.headers.get("Host") or "").rpartition(":")[0]
        if host not in ("127.0.0.1", "localhost"):  # a name of somebody else's that leads here
            self.send_error(403)
            return
        kind, make = self.pages.get(self.path, ("", None))
        if make is None:
            self.send_error(404)
            return
        try:
            body = make().encode()
        except Exception as error:  # a file that is half there: the page asks again
            self.send_error(503, explain=f"{type(error).__name__}: {error}")
            return
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    code: str = get_plotlyjs()
    return code
