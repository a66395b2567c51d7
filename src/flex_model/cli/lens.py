"""``flex-model lens``: what would the model predict if it ended after each layer? By the logit lens, or a tuned one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor

from flex_model import FlexModel
from flex_model.cli.models import ModelError
from flex_model.cli.spread import Fsdp, Pp, Spread, Tp
from flex_model.cli.start import Cache, Desk, Model, Out, prepared, run_on, told
from flex_model.cli.text import Words
from flex_model.lens import LogitLens, TunedLens, logit_lens

__all__ = ["lens"]

_WIDTH, _ROWS = 64, 4  # tokens of a text in a batch,
_TOKENS = 64  # of which a step trains on so many: the unembedding is what takes time


@dataclass(frozen=True, slots=True)
class Job:
    """What each process is told."""

    name: str
    folder: Path
    out: Path
    spread: Spread
    prompts: tuple[str, ...]
    tuned: Path | None
    text: Path | None
    steps: int


def lens(
    model: Model,
    out: Out,
    prompt: Annotated[list[str], typer.Option(help="A text to read; give several by repeating it")] = [  # noqa: B006
        "The capital of France is"
    ],
    tuned: Annotated[
        Path | None, typer.Option(file_okay=False, help="A tuned lens, trained into this folder first if there is none")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="What a tuned lens is trained on; default: Python's own manual"),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help=f"Of training, on {_TOKENS} tokens each")] = 40,
    tp: Tp = 1,
    fsdp: Fsdp = 1,
    pp: Pp = 1,
    cache: Cache = Path(".models"),
) -> None:
    """Read every layer's prediction, as the model would make it if it ended there.

    A heatmap of layers by positions for each prompt: the divergence from the model's own prediction as colour, the most
    probable next token as text.
    """
    with told():
        spread = Spread(tp, fsdp, pp)
        folder, _ = prepared(model, cache, spread, out)
        Words(folder).batch(prompt)
        run_on(spread.processes, run, Job(model, folder, out, spread, tuple(prompt), tuned, text, steps))


def run(job: Job) -> None:
    """One process's part."""
    desk, words = Desk(job.spread.processes, job.out), Words(job.folder)
    fm = desk.load(job.name, job.folder, job.spread)
    batch = words.batch(job.prompts)
    mine = job.spread.mine(fm.module, batch)
    read: Callable[..., LogitLens] = partial(logit_lens, fm) if job.tuned is None else _tuned(job, desk, fm, words)
    found = read(**mine)
    for i, prompt in enumerate(job.prompts):
        length = int(batch["attention_mask"][i].sum())
        one = LogitLens(
            found.top[:, i : i + 1, :length],
            found.probability[:, i : i + 1, :length],
            found.divergence[:, i : i + 1, :length],
            found.tokens[i : i + 1, :length],
        )
        desk.console.print(_table(one, prompt, words))
        name = "lens" if len(job.prompts) == 1 else f"lens-{i}"
        if desk.first:
            desk.write(name, one.plot(decode=words.show), one.to_dataframe())
    if dist.is_initialized():
        dist.destroy_process_group()


def _tuned(job: Job, desk: Desk, fm: FlexModel, words: Words) -> TunedLens:
    assert job.tuned is not None
    if (job.tuned / "config.json").exists():
        return TunedLens.load(fm, job.tuned)
    made = TunedLens(fm)
    training = made.fit(_batches(job, fm, words), steps=job.steps, tokens=_TOKENS)
    made.save(job.tuned)
    if desk.first:
        desk.write("training", training.plot(), training.to_dataframe())
    desk.console.print(f"Trained a lens for {job.steps} steps; it is in {job.tuned}.", markup=False)
    return made


def _batches(job: Job, fm: FlexModel, words: Words) -> list[dict[str, Tensor]]:
    """Pieces of the text, in a random order that is the same on every process."""
    ids = words.batch([_text(job.text)], "--text")["input_ids"][0]
    width = min(_WIDTH, int(getattr(fm.config.get_text_config(), "max_position_embeddings", _WIDTH)))
    pieces = ids[: len(ids) // width * width].view(-1, width)
    if len(pieces) < _ROWS:
        raise ModelError(
            f"--text has {len(ids)} tokens; a lens needs {_ROWS * width} or more to be trained on.", page="bad-argument"
        )
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))
    rows: Iterator[Any] = iter(pieces[order].split(_ROWS))
    return [job.spread.mine(fm.module, {"input_ids": r}) for r in rows if len(r) == _ROWS][: job.steps]


def _text(path: Path | None) -> str:
    if path is not None:
        return path.read_text(errors="replace")
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def _table(found: LogitLens, prompt: str, words: Words) -> Any:
    """What each layer predicts behind the prompt."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("layer", "next token", "probability", "divergence (nats)", title=escape(prompt), title_justify="left")
    for layer in range(len(found.top)):
        top, probability, divergence = (t[layer, 0, -1] for t in (found.top, found.probability, found.divergence))
        table.add_row(
            str(layer), escape(repr(words.show(int(top)))), f"{float(probability):.3f}", f"{float(divergence):.3f}"
        )
    return table
