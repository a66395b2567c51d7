"""A progress bar for work that takes many forwards, on one rank's terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(total: int, what: str, progress: bool | None, *, done: int = 0) -> Iterator[Callable[..., object]]:
    """Yields what is called after each step, with a few words to show if there is something to say.

    It is shown if there is a terminal and the work is long; ``progress`` decides otherwise.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    if not first or not (progress if progress is not None else total > 20 and sys.stderr.isatty()):
        yield lambda note="": None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda note="": bar.update(task, advance=1, description=f"{what} {note}".rstrip())
