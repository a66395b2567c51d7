"""``flex-model watch``: a page about a run that goes on."""

from __future__ import annotations

import webbrowser
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flex_model.cli.start import told
from flex_model.show.watch import serve
from flex_model.show.watch.reading import Run

__all__ = ["watch"]


def watch(
    folder: Annotated[Path, typer.Argument(help="Where a harvest or fm.log writes")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="On 127.0.0.1; 0 for any that is free")] = 8765,
    browser: Annotated[bool, typer.Option(help="Open the page")] = True,
) -> None:
    """Show how a harvest or a training run goes on: progress, rates, norms of sites, and which hooks fire on each rank.

    It only reads what the run writes. From another machine: ssh -L 8765:127.0.0.1:8765 HOST.
    """
    with told(), serve(Run(folder), port) as server:
        address = f"http://127.0.0.1:{server.server_port}/"
        Console(soft_wrap=True).print(f"{folder} is shown at {address} until Ctrl-C.", markup=False)
        if browser:
            webbrowser.open(address)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
