"""``flex-model patch``: which values carry what makes the model answer one prompt and not another?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch.distributed as dist
import typer
from torch import Tensor

from flex_model.cli.models import ModelError
from flex_model.cli.spread import Fsdp, Pp, Spread, Tp
from flex_model.cli.start import Cache, Desk, Model, Out, prepared, run_on, told
from flex_model.cli.text import Words
from flex_model.lens import Patching, activation_patching, attribution_patching

__all__ = ["patch"]

Over = Literal["position", "head"]
_CLEAN = "When Mary and John went to the store, John gave a drink to"
_CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"


@dataclass(frozen=True, slots=True)
class Job:
    """What each process is told."""

    name: str
    folder: Path
    out: Path
    spread: Spread
    prompts: tuple[str, str]
    words: tuple[str, str]
    component: str
    over: Over
    estimate: bool


def patch(
    model: Model,
    out: Out,
    clean: Annotated[str, typer.Option(help="The prompt that the answer belongs to")] = _CLEAN,
    corrupted: Annotated[str, typer.Option(help="The same with something else in it, of as many tokens")] = _CORRUPTED,
    answer: Annotated[str, typer.Option(help="The clean prompt's next token")] = " Mary",
    against: Annotated[str, typer.Option(help="The corrupted prompt's next token")] = " John",
    component: Annotated[str, typer.Option(help="What is patched: resid_pre, attn_out, mlp_out, z, ...")] = "resid_pre",
    over: Annotated[Over, typer.Option(help="What is patched one by one in each layer")] = "position",
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Attribution patching: from one gradient instead of a forward a cell")
    ] = False,
    tp: Tp = 1,
    fsdp: Fsdp = 1,
    pp: Pp = 1,
    cache: Cache = Path(".models"),
) -> None:
    """Run the corrupted prompt with one value at a time from the clean one, and see how much of the answer returns.

    A heatmap of layers by positions, or by heads: the share of the logit difference between the two answers that is
    restored.
    """
    with told():
        spread = Spread(tp, fsdp, pp)
        folder, _ = prepared(model, cache, spread, out)
        words = Words(folder)
        lengths = [words.batch([p], "a prompt")["input_ids"].shape[1] for p in (clean, corrupted)]
        if lengths[0] != lengths[1]:
            raise ModelError(
                f"--clean has {lengths[0]} tokens and --corrupted {lengths[1]}; give prompts of as many tokens.",
                page="bad-argument",
            )
        words.one(answer, "--answer"), words.one(against, "--against")
        job = Job(model, folder, out, spread, (clean, corrupted), (answer, against), component, over, estimate)
        run_on(spread.processes, run, job)


def run(job: Job) -> None:
    """One process's part."""
    desk, words = Desk(job.spread.processes, job.out), Words(job.folder)
    fm = desk.load(job.name, job.folder, job.spread)
    right, wrong = (words.one(word, "a word") for word in job.words)

    def difference(logits: Tensor) -> Tensor:
        return (logits[:, -1, right] - logits[:, -1, wrong]).mean()

    clean, corrupted = (job.spread.mine(fm.module, words.batch([p])) for p in job.prompts)
    sweep: Any = attribution_patching if job.estimate else activation_patching
    found: Patching = sweep(fm, clean, corrupted, difference, component=job.component, over=job.over)
    labels = [words.show(int(t)) for t in words.batch([job.prompts[1]])["input_ids"][0]]
    _report(desk, job, found, labels)
    if dist.is_initialized():
        dist.destroy_process_group()


def _report(desk: Desk, job: Job, found: Patching, labels: list[str]) -> None:
    from rich.markup import escape
    from rich.table import Table

    names = f"{job.words[0]!r} - {job.words[1]!r}"
    desk.console.print(
        f"Logit difference {names}: {found.clean:.3f} clean, {found.corrupted:.3f} corrupted.", markup=False
    )
    table = Table("layer", job.over, "restored", title=f"What restores it, {job.component}", title_justify="left")
    width = found.effect.shape[1]
    for cell in found.restored.flatten().topk(min(5, found.effect.numel())).indices.tolist():
        layer, column = divmod(cell, width)
        where = f"{column} {labels[column]!r}" if job.over == "position" else str(column)
        table.add_row(str(layer), escape(where), f"{float(found.restored[layer, column]):.3f}")
    desk.console.print(table)
    if desk.first:
        desk.write("patch", found.plot(labels if job.over == "position" else None), found.to_dataframe())
