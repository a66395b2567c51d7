"""``flex-model induction``: find the heads that copy what came before, remove them, and compare with one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from flex_model import FlexModel
from flex_model.cli.models import ModelError
from flex_model.cli.spread import Fsdp, Pp, Spread, Tp
from flex_model.cli.start import Cache, Desk, Model, Out, prepared, run_on, told
from flex_model.lens.induction import Induction, measure, repeated_tokens

__all__ = ["induction"]


@dataclass(frozen=True, slots=True)
class Job:
    """What each process is told: where the weights are, over how many processes, and what to measure on."""

    name: str
    folder: Path
    out: Path
    spread: Spread
    top: int
    ids: torch.Tensor  # (B, 2 * length)


def induction(
    model: Model,
    out: Out,
    top: Annotated[int, typer.Option(min=1, help="Heads to show and to remove")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Sequences")] = 2,
    length: Annotated[int, typer.Option(min=2, help="Random tokens, before they are repeated")] = 50,
    seed: Annotated[int, typer.Option(help="Of the random tokens")] = 0,
    tp: Tp = 1,
    fsdp: Fsdp = 1,
    pp: Pp = 1,
    cache: Cache = Path(".models"),
) -> None:
    """Find a model's induction heads, remove them while it runs split, and compare with one process."""
    with told():
        spread = Spread(tp, fsdp, pp)
        folder, config = prepared(model, cache, spread, out)
        job = Job(model, folder, out, spread, top, _tokens(config, batch, length, seed))
        run_on(spread.processes, run, job)


def run(job: Job) -> None:
    """One process's part; the first one reports, and then does the same job alone on an unsplit model."""
    several = job.spread.processes > 1
    desk = Desk(job.spread.processes, job.out)
    with _steps(desk.console, 8 if several else 4) as step:
        split = _measure(job, job.spread, step)
        if dist.is_initialized():
            dist.destroy_process_group()
        if desk.first:
            _report(desk, job, split)
        if desk.first and several:
            torch.set_num_threads(os.cpu_count() or 1)
            alone = _measure(job, Spread(), step)
            alone.save_json(job.out / "one_process.json")
            differences = ", ".join(f"{what} {d:.1e}" for what, d in split.difference(alone).items())
            desk.console.print(f"Largest difference from one process: {differences}.")


def _measure(job: Job, spread: Spread, step: Callable[[str], None]) -> Induction:
    step(f"loading {job.name} {spread}")
    model = spread.load(job.folder)
    ids = spread.mine(model, {"input_ids": job.ids})["input_ids"]
    return measure(FlexModel(model), ids, top=job.top, progress=lambda what: step(f"{what}, {spread}"))


def _report(desk: Desk, job: Job, found: Induction) -> None:
    found.save_json(job.out / "induction.json")
    desk.console.print(found.table(job.top))
    count = len(found.removed)
    desk.console.print(
        f"Loss on the repeated half: {found.loss.second:.3f}; without these {count} heads: "
        f"{found.loss_without.second:.3f}; without {count} random ones: {found.loss_without_random.second:.3f}."
    )
    desk.write("induction", found.plot(), found.to_dataframe())


def _tokens(config: Any, batch: int, length: int, seed: int) -> torch.Tensor:
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and 2 * length > longest:
        raise ModelError(f"--length {length} makes {2 * length} positions, and the model has {longest}.")
    high = min(15_000, config.vocab_size)  # the rarest tokens of a large vocabulary are hardly trained
    return repeated_tokens(batch, length, seed, low=min(500, high // 2), high=high)


@contextmanager
def _steps(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar, and the function that names each step as it begins."""
    columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        done = count()
        yield lambda what: progress.update(task, description=what, completed=next(done))
