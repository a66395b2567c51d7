"""``flex-model harvest``: texts through a model, over any number of processes, and its activations into a store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
import typer

from flex_model.cli.models import SAFE, ModelError, find_model, require
from flex_model.cli.spread import Fsdp, Pp, Spread, Tp
from flex_model.cli.start import Cache, Desk, Model, run_on, told
from flex_model.components.place import COMPONENTS, IN_LAYERS
from flex_model.harvest import Forecast
from flex_model.texts import TokenBatches

__all__ = ["harvest"]


@dataclass(frozen=True, slots=True)
class Job:
    """What each process is told."""

    name: str
    folder: Path
    out: str
    spread: Spread
    sites: tuple[str, ...]
    layers: tuple[int, ...] | None
    texts: dict[str, Any]  # of TokenBatches
    options: dict[str, Any]  # of fm.harvest


def harvest(
    model: Model,
    data: Annotated[
        list[str],
        typer.Option(help="JSON lines, Parquet, text files, folders, patterns; with --split a dataset's name"),
    ],
    out: Annotated[str, typer.Option(help="The store: a folder, s3://bucket/path or gs://bucket/path")],
    site: Annotated[
        list[str] | None,
        typer.Option(
            help="A part of the model, such as resid_post (which it is if not given), or a pattern of modules"
        ),
    ] = None,
    layers: Annotated[
        str, typer.Option(help="Of these parts: numbers and ranges, such as 0,3-5; all if not given")
    ] = "",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16, ...; the model's own if not given")
    ] = None,
    context_size: Annotated[int, typer.Option(min=1, help="Tokens a context")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Contexts a forward, over all processes")] = 8,
    packing: Annotated[bool, typer.Option(help="Documents follow one another; or a row each")] = True,
    prepend_bos: Annotated[
        bool | None, typer.Option(help="Contexts begin with BOS; if not given, where there is one")
    ] = None,
    exclude_token: Annotated[
        list[str] | None, typer.Option(help="No rows for it: an id, a token, bos, or special")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="End after so many")] = None,
    text_field: Annotated[str, typer.Option(help="Of records")] = "text",
    label_field: Annotated[str | None, typer.Option(help="Of records: a number that is stored with the rows")] = None,
    lines: Annotated[bool, typer.Option("--lines", help="Text files hold a document a line")] = False,
    split: Annotated[str | None, typer.Option(help="Of a dataset that is not in files here")] = None,
    commit_every: Annotated[int | None, typer.Option(min=1, help="Forwards between commits")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with a store that the same command has begun")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell bytes, size and time, from three forwards")
    ] = False,
    tp: Tp = 1,
    fsdp: Fsdp = 1,
    pp: Pp = 1,
    cache: Cache = Path(".models"),
) -> None:
    """Write what parts of a model see in texts to a store, each number by the process that has it."""
    with told():
        require(["transformers", "safetensors", "accelerate"], install="'flex-model[hf]'")
        require(["numpy", "tensorstore", "xxhash"], install="'flex-model[store]'")
        spread, folder = Spread(tp, fsdp, pp), find_model(model, cache)
        spread.check(folder)
        texts = {
            "source": data[0] if len(data) == 1 else data,
            "context_size": context_size,
            "batch_size": batch_size,
            "packing": packing,
            "prepend_bos": prepend_bos,
            "exclude_tokens": [int(t) if t.isdigit() else t for t in exclude_token or ()],
            "max_tokens": max_tokens,
            "text_field": text_field,
            "label_field": label_field,
            "lines": lines,
            "split": split,
        }
        _batches(texts, folder)  # what is wrong with them is said before processes start
        options = {"dtype": dtype, "commit_every": commit_every, "resume": resume, "dry_run": dry_run}
        run_on(
            spread.processes,
            run,
            Job(model, folder, out, spread, tuple(site or ["resid_post"]), _layers(layers), texts, options),
        )


def run(job: Job) -> None:
    """One process's part."""
    desk = Desk(job.spread.processes, Path(job.out))
    fm = desk.load(job.name, job.folder, job.spread)
    sites = [fm.at(s, job.layers if s in IN_LAYERS else None) if s in COMPONENTS else s for s in job.sites]
    about = {"model": job.name}
    done = fm.harvest(_batches(job.texts, job.folder), sites, job.out, about=about, **job.options)
    if isinstance(done, Forecast):
        desk.console.print(done.table())
    desk.console.print(str(done), markup=False, highlight=False)
    if dist.is_initialized():
        dist.destroy_process_group()


def _batches(texts: dict[str, Any], folder: Path) -> TokenBatches:
    from transformers import AutoTokenizer

    given = {**texts}
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, **SAFE)
    except (OSError, ValueError):
        tokenizer = None  # data that are tokens need none
    return TokenBatches(given.pop("source"), tokenizer, **given)


def _layers(text: str) -> tuple[int, ...] | None:
    """
    >>> _layers("0,3-5")
    (0, 3, 4, 5)
    """
    if not text:
        return None
    found: list[int] = []
    for part in text.split(","):
        low, _, high = part.strip().partition("-")
        if not low.isdigit() or (high and not high.isdigit()):
            raise ModelError(f"--layers {text}: {part!r} is no number and no range such as 3-5.", page="bad-argument")
        found += range(int(low), int(high or low) + 1)
    return tuple(found)
