"""What the commands share: options, how processes are started, where results go, and how errors are told."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from flex_model import FlexModel
from flex_model.cli.models import find_model, require
from flex_model.cli.processes import start
from flex_model.cli.spread import Spread
from flex_model.errors import FlexModelError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["Cache", "Desk", "Model", "Out", "launch", "prepared", "run_on", "started", "told"]

Model = Annotated[str, typer.Option(help="A folder of transformers weights, a GGUF, or: smollm2, tiny-llama")]
Out = Annotated[Path, typer.Option(file_okay=False, help="Where pictures and tables go")]
Cache = Annotated[
    Path, typer.Option(envvar="FLEX_MODEL_CACHE", file_okay=False, help="Where converted models are kept")
]


def started() -> bool:
    """Whether torchrun, or another command of ours, has started this process as one of several."""
    return "RANK" in os.environ


def prepared(model: str, cache: Path, spread: Spread, out: Path) -> tuple[Path, Any]:
    """The folder of weights and the configuration, once all that the command needs is there; ``out`` is made."""
    require(["transformers", "safetensors", "accelerate"], install="'flex-model[hf]'")
    require(["pandas", "plotly"], install="'flex-model[plot]'")
    folder = find_model(model, cache)
    config = spread.check(folder)
    out.mkdir(parents=True, exist_ok=True)
    return folder, config


def run_on(processes: int, worker: Callable[[Any], Any], job: Any) -> None:
    """``worker(job)`` here, or in as many processes as it takes."""
    if processes == 1 or started():
        worker(job)
    else:
        launch(worker, job, processes)


class Desk:
    """Where one process of a command tells what it does and found: the first one only."""

    def __init__(self, processes: int, out: Path) -> None:
        self.first = int(os.environ.get("RANK", 0)) == 0
        self.console = Console(quiet=not self.first, soft_wrap=True)
        self.out = out
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Something that takes a while, without a bar of its own."""
        with Console(stderr=True, quiet=not self.first).status(what):
            yield

    def load(self, name: str, folder: Path, spread: Spread) -> FlexModel:
        with self.busy(f"loading {name} {spread}"):
            return FlexModel(spread.load(folder))

    def write(self, name: str, figure: Figure, table: Any) -> None:
        """A picture, as a page and static where that can be drawn, and its table."""
        if not self.first:
            return
        from flex_model.result import save_figure

        written = [save_figure(figure, self.out / f"{name}.html")]
        try:
            written.append(save_figure(figure, self.out / f"{name}.png"))
        except FlexModelError as error:
            self.console.print(f"No static picture: {error}", markup=False)
        table.to_csv(self.out / f"{name}.csv", index=False)
        self.console.print(f"Wrote {', '.join(map(str, [*written, self.out / f'{name}.csv']))}.", markup=False)


def launch(worker: Callable[[Any], Any], job: Any, processes: int) -> dict[int, Any]:
    """``worker(job)`` in processes on this machine: what each returned."""
    if torch.cuda.device_count() < processes:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # NCCL takes one process a device: all of them go to the CPU
    Console(stderr=True).print(f"Starting {processes} processes.")
    try:
        return start(worker, job, processes)
    except SignalException as stopped:
        raise typer.Exit(128 + int(stopped.sigval)) from stopped
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message: Any = failure.message
        raise FlexModelError(
            f"process {rank} failed: {message['message'] if isinstance(message, dict) else message}",
            page="process-failed",
        ) from error


@contextmanager
def told(code: int = 2) -> Iterator[None]:
    """Our errors end the command with their one sentence, said by the first process only."""
    try:
        yield
    except FlexModelError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(code) from error
