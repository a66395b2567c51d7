"""``flex-model steer``: generate with and without a direction added to the residual stream."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

from flex_model import FlexModel
from flex_model.cli.models import ModelError
from flex_model.cli.spread import Fsdp, Pp, Spread, Tp
from flex_model.cli.start import Cache, Desk, Model, Out, prepared, run_on, told
from flex_model.cli.text import Words
from flex_model.lens import steering_vector

__all__ = ["steer"]

_TOWARD = ["I love this", "I adore it", "This is wonderful"]
_AWAY = ["I hate this", "I loathe it", "This is terrible"]


@dataclass(frozen=True, slots=True)
class Job:
    """What each process is told."""

    name: str
    folder: Path
    out: Path
    spread: Spread
    prompt: str
    toward: tuple[str, ...]
    away: tuple[str, ...]
    layer: int
    scale: float
    tokens: int


def steer(
    model: Model,
    out: Out,
    prompt: Annotated[str, typer.Option(help="What the model goes on from")] = "I went to the wedding, and",
    toward: Annotated[list[str], typer.Option(help="A text of the kind wanted; repeat for several")] = _TOWARD,
    away: Annotated[list[str], typer.Option(help="A text of the other kind; repeat for several")] = _AWAY,
    layer: Annotated[int | None, typer.Option(help="Whose output is steered; default: the middle one")] = None,
    scale: Annotated[float, typer.Option(help="How many times the difference is added")] = 2.0,
    tokens: Annotated[int, typer.Option(min=1, help="How many to generate")] = 30,
    tp: Tp = 1,
    fsdp: Fsdp = 1,
    pp: Pp = 1,
    cache: Cache = Path(".models"),
) -> None:
    """Generate twice, greedily: as the model is, and steered from one kind of texts toward another.

    What is added is the difference of the means of both kinds' last tokens, at every position and step.
    """
    with told():
        spread = Spread(tp, fsdp, pp)
        folder, config = prepared(model, cache, spread, out)
        layers = int(config.num_hidden_layers)
        chosen = layers // 2 if layer is None else layer
        if not -layers <= chosen < layers:
            raise ModelError(f"--layer {layer} is none of the model's {layers} layers.", page="bad-argument")
        words = Words(folder)
        for text, option in (([prompt], "--prompt"), (toward, "--toward"), (away, "--away")):
            words.batch(text, option)
        job = Job(model, folder, out, spread, prompt, tuple(toward), tuple(away), chosen % layers, scale, tokens)
        run_on(spread.processes, run, job)


def run(job: Job) -> None:
    """One process's part."""
    desk, words = Desk(job.spread.processes, job.out), Words(job.folder)
    fm = desk.load(job.name, job.folder, job.spread)
    toward, away, prompt = (
        job.spread.mine(fm.module, words.batch(texts)) for texts in (job.toward, job.away, [job.prompt])
    )
    found = steering_vector(fm, toward, away, layer=job.layer)
    texts = []
    with desk.busy("generating"):
        texts.append(_generate(job, fm, words, prompt))
        with fm.edit(fm.at("resid_post", job.layer), found.edit(job.scale)):
            texts.append(_generate(job, fm, words, prompt))
    for kind, text in zip(("As it is", f"Steered {job.scale:g} times at layer {job.layer}"), texts, strict=True):
        desk.console.print(f"{kind}: {text}", markup=False)
    if desk.first:
        told: dict[str, Any] = {"plain": texts[0], "steered": texts[1], "layer": job.layer, "scale": job.scale}
        (job.out / "steer.json").write_text(json.dumps(told, indent=1) + "\n")
        desk.write("steer", found.plot(), found.to_dataframe())
    if dist.is_initialized():
        dist.destroy_process_group()


@torch.no_grad()
def _generate(job: Job, fm: FlexModel, words: Words, prompt: dict[str, Any]) -> str:
    out = fm.generate(
        **prompt,
        max_new_tokens=job.tokens,
        do_sample=False,
        synced_gpus=job.spread.fsdp > 1,  # ranks gather weights in every step
        pad_token_id=0,
    )
    return words.text(out[0].tolist())
