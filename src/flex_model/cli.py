"""``flex-model``: analyses from the command line. It starts the processes itself unless torchrun did."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
except ModuleNotFoundError as missing:
    raise SystemExit(f"flex-model needs {missing.name}; run: pip install 'flex-model[cli]'") from missing

import torch
import torch.distributed as dist

from flex_model import FlexModel, FlexModelError
from flex_model.cli_doctor import doctor
from flex_model.cli_models import ModelError, check_split, find_model, require
from flex_model.cli_start import Cache, check_start, launch, load, started, told
from flex_model.lens.induction import Induction, measure, repeated_tokens

__all__ = ["app", "main"]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


app.command()(doctor)


@dataclass(frozen=True, slots=True)
class Job:
    """What each process is told: where the weights are, over how many processes, and what to measure on."""

    name: str
    folder: Path
    out: Path
    tp: int
    top: int
    ids: torch.Tensor  # (B, 2 * length)


def main() -> None:
    """The ``flex-model`` script."""
    app()


@app.callback()
def flex_model() -> None:
    """Read, edit and probe models that are spread over many processes."""


@app.command()
def induction(
    model: Annotated[str, typer.Option(help="A folder of transformers weights, a GGUF, or: smollm2")],
    out: Annotated[Path, typer.Option(file_okay=False, help="Where the picture and the scores go")],
    tp: Annotated[int, typer.Option(min=1, help="Processes to split each layer over")] = 1,
    top: Annotated[int, typer.Option(min=1, help="Heads to show and to remove")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Sequences")] = 2,
    length: Annotated[int, typer.Option(min=2, help="Random tokens, before they are repeated")] = 50,
    seed: Annotated[int, typer.Option(help="Of the random tokens")] = 0,
    cache: Cache = Path(".models"),
) -> None:
    """Find a model's induction heads, remove them while it runs split, and compare with one process."""
    with told():
        check_start(tp)
        require(["transformers", "safetensors", "accelerate"], install="'flex-model[hf]'")
        require(["pandas", "plotly"], install="'flex-model[plot]'")
        folder = find_model(model, cache)
        ids = _tokens(check_split(folder, tp), batch, length, seed)
        out.mkdir(parents=True, exist_ok=True)
        job = Job(model, folder, out, tp, top, ids)
        if tp == 1 or started():
            run(job)
        else:
            launch(run, job, tp)


def run(job: Job) -> None:
    """One process's part; the first one reports, and then does the same job alone on an unsplit model."""
    rank = int(os.environ.get("RANK", 0))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // job.tp))
    with _steps(Console(quiet=rank != 0, soft_wrap=True), 6 if job.tp > 1 else 3) as (console, step):
        split = _measure(job, job.tp, step)
        if dist.is_initialized():
            dist.destroy_process_group()
        if rank == 0:
            _report(console, job, split)
        if rank == 0 and job.tp > 1:
            torch.set_num_threads(os.cpu_count() or 1)
            alone = _measure(job, 1, step)
            alone.save_json(job.out / "one_process.json")
            differences = ", ".join(f"{what} {d:.1e}" for what, d in split.difference(alone).items())
            console.print(f"Largest difference from one process: {differences}.")


def _measure(job: Job, tp: int, step: Callable[[str], None]) -> Induction:
    where = f"over {tp} processes" if tp > 1 else "on one process"
    step(f"loading {job.name} {where}")
    fm = FlexModel(load(job.folder, tp))
    return measure(fm, job.ids.to(fm.device), top=job.top, progress=lambda what: step(f"{what}, {where}"))


def _report(console: Console, job: Job, found: Induction) -> None:
    picture = _picture(console, found, job.out)
    scores = found.save_json(job.out / "induction.json")
    console.print(found.table(job.top))
    console.print(
        f"Loss on the repeated half: {found.loss.second:.3f}; "
        f"without these {len(found.removed)} heads: {found.loss_without.second:.3f}."
    )
    console.print(f"Wrote {picture} and {scores}.")


def _picture(console: Console, found: Induction, folder: Path) -> Path:
    try:
        return found.save(folder / "induction.png")
    except FlexModelError as error:
        console.print(f"No static picture: {error}")
        return found.save(folder / "induction.html")


def _tokens(config: Any, batch: int, length: int, seed: int) -> torch.Tensor:
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and 2 * length > longest:
        raise ModelError(f"--length {length} makes {2 * length} positions, and the model has {longest}.")
    high = min(15_000, config.vocab_size)  # the rarest tokens of a large vocabulary are hardly trained
    return repeated_tokens(batch, length, seed, low=min(500, high // 2), high=high)


@contextmanager
def _steps(console: Console, total: int) -> Iterator[tuple[Console, Callable[[str], None]]]:
    """A progress bar, and the function that names each step as it begins."""
    columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        done = count()
        yield progress.console, lambda what: progress.update(task, description=what, completed=next(done))
