"""Part ``peers``: the same rows of the same prompts on disk, by others; on one process, which is all they can do."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cells import cell, measured, spread, synced, table
from harvests.given import batches, by_hand, error, load

Data = list[dict[str, Tensor]]
Rows = Callable[[int], Tensor]  # of a layer, all that were written
BUFFER = 4  # batches that SAELens holds before it writes a shard


# -- ways: each makes ready what is not timed, and gives what is; that gives what reads the rows back ----------------
def flex_model(model: str, data: Data, path: Path, layers: list[int]) -> Callable[[], Rows]:
    from flex_model import FlexModel

    fm = FlexModel(load(model))

    def run() -> Rows:
        store = fm.harvest(data, fm.at("resid_post", layers), path).store
        return lambda layer: store[f"@resid_post.{layer}"].torch()

    return run


def hooks(model: str, data: Data, path: Path, layers: list[int]) -> Callable[[], Rows]:
    """Written by hand, a file a batch; without the language model's head, which nobody needs here."""
    body = load(model).model

    @torch.no_grad()
    def run() -> Rows:
        seen: dict[int, Tensor] = {}
        for n in layers:
            body.layers[n].register_forward_hook(lambda m, a, out, n=n: seen.__setitem__(n, out))
        for number, batch in enumerate(data):
            body(**batch, use_cache=False)
            torch.save(seen, path / f"{number:06d}.pt")
        return _of_files(path)

    return run


def nnsight(model: str, data: Data, path: Path, layers: list[int]) -> Callable[[], Rows]:
    """As by hand, with a trace a batch."""
    import nnsight

    body = nnsight.NNsight(load(model).model)

    @torch.no_grad()
    def run() -> Rows:
        for number, batch in enumerate(data):
            with body.trace(batch["input_ids"], use_cache=False):
                seen = nnsight.save([body.layers[n].output for n in layers])
            torch.save(dict(zip(layers, seen, strict=True)), path / f"{number:06d}.pt")
        return _of_files(path)

    return run


def _of_files(path: Path) -> Rows:
    return lambda layer: torch.cat([torch.load(p)[layer].flatten(0, 1) for p in sorted(path.glob("*.pt"))])


def sae_lens(model: str, data: Data, path: Path, layers: list[int]) -> Callable[[], Rows]:
    """Its runner, which caches one site a run."""
    from datasets import Dataset
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
    from transformers import AutoConfig

    (layer,) = layers
    prompts, width = torch.cat([b["input_ids"] for b in data]), AutoConfig.from_pretrained(model).hidden_size
    samples, length = data[0]["input_ids"].shape
    config = CacheActivationsRunnerConfig(
        dataset_path="given",
        model_name=model,
        model_class_name="AutoModelForCausalLM",
        model_from_pretrained_kwargs={"dtype": torch.float32},
        model_batch_size=samples,
        hook_name=f"model.layers.{layer}",
        d_in=width,
        training_tokens=prompts.numel(),
        context_size=length,
        new_cached_activations_path=str(path),
        shuffle=False,
        device="cpu",
        buffer_size_gb=(min(BUFFER, len(data)) * samples * length + 0.5) * width * 4 / 1e9,
        prepend_bos=False,
        streaming=False,
    )
    runner = CacheActivationsRunner(config, override_dataset=Dataset.from_dict({"input_ids": prompts.tolist()}))

    def run() -> Rows:
        found = runner.run()
        return lambda _: torch.as_tensor(found.with_format("torch")[config.hook_name][:]).flatten(0, 1)

    return run


# -- cells -----------------------------------------------------------------------------------------------------
def written(*, way: str, model: str, folder: str, tokens: int, samples: int, length: int, layers: list[int],
            packages: list[str], threads: int, check: bool = False) -> Any:  # fmt: skip
    """What it took until all was on the disk; with ``check`` nothing is measured, and rows go to a file instead."""
    torch.set_num_threads(threads)
    path = Path(folder) / way
    shutil.rmtree(path, ignore_errors=True)
    if way in ("hooks", "nnsight"):
        path.mkdir()
    run = globals()[way](model, batches(tokens, samples, length), path, layers)
    with measured() as took:
        rows = run()
        synced(path)
    if check:
        torch.save({layer: rows(layer) for layer in layers}, Path(folder) / f"{way}.pt")
    size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    shutil.rmtree(path)
    return took | {"bytes": size, "versions": {p: version(p) for p in packages}}


def compared(*, model: str, folder: str, tokens: int, samples: int, length: int, layers: list[int],
             ways: list[str]) -> dict[str, float]:  # fmt: skip
    """``{way: largest relative error}`` from plain hooks."""
    want = by_hand(load(model), batches(tokens, samples, length), layers)
    found = {way: torch.load(Path(folder) / f"{way}.pt") for way in ways}
    return {way: max(error(rows[n], want[f"@resid_post.{n}"]) for n in layers) for way, rows in found.items()}


# -- the page --------------------------------------------------------------------------------------------------
def ways() -> dict[str, tuple[str, str, list[str]]]:
    """``{way: (title, interpreter, packages)}``; environments that are not there are made."""
    from environments import TESTED, make
    from lines import TOOLS

    mine = ["torch", "transformers"]
    theirs = make("nnsight", TOOLS["nnsight"].needs)
    return {
        "flex_model": ("fm.harvest", sys.executable, ["flex-model", *mine]),
        "hooks": ("hooks and torch.save", sys.executable, mine),
        "nnsight": ("nnsight and torch.save", theirs, ["nnsight", *mine]),
        "sae_lens": ("SAELens", make("saes", TESTED["saes"], constrained=True), ["sae-lens", *mine]),
    }


def report(options: Any) -> list[str]:
    title = "Beside peers"
    if options.model is None:
        return [title, "Left out: there are no weights of SmolLM2 here."]
    tools = ways()
    every = list(range(30))
    given = {n: getattr(options, n) for n in ("model", "folder", "samples", "length")}
    shard = BUFFER * options.samples * options.length
    tokens = max(1, options.model_tokens // shard) * shard
    lines = [
        title,
        f"{options.model_name}, {tokens:,} tokens in batches of {options.samples} x {options.length}, rows in float32, "
        f"on one process with one thread for the model; of a split model none of the others writes whole rows. From "
        f"the first batch until every file is on the disk by fsync; each run in a fresh process, by turns; memory is "
        f"the process's most from then on. Rows are compared with plain hooks' first (largest relative error).",
        "",
    ]
    for layers, kept in ((every, list(tools)[:3]), (every[-1:], list(tools))):
        lines += [f"{len(layers)} sites:" if len(layers) > 1 else "One site, the last layer's:", ""]
        chosen = {way: tools[way] for way in kept}
        lines += table(list(_rows(chosen, given | {"layers": layers}, tokens, max(1, options.rounds // 2 + 1))))
    lines += [f"* {tools[w][0]}: {', '.join(f'{p} {v}' for p, v in found.items())}" for w, found in _versions.items()]
    return [
        *lines,
        f"* SAELens's runner caches one site a run, and runs the model's head as well; it held {BUFFER} batches a "
        f"shard.",
    ]


_versions: dict[str, dict[str, str]] = {}


def _rows(tools: dict[str, Any], given: dict[str, Any], tokens: int, turns: int) -> Iterator[list[str]]:
    few = given | {"tokens": 2 * given["samples"] * given["length"]}
    took: dict[str, list[dict[str, Any]]] = {way: [] for way in tools}
    for turn in range(-1, turns):
        for way, (_, python, packages) in tools.items() if turn % 2 else reversed(tools.items()):
            some = few | {"check": True} if turn < 0 else given | {"tokens": tokens}
            found = cell("harvests.peers", "written", python=python, way=way, packages=packages, threads=1, **some)[0]
            _versions[way] = found["versions"]
            if turn >= 0:
                took[way].append(found)
        if turn < 0:
            (apart,) = cell("harvests.peers", "compared", ways=list(tools), **few)
            assert max(apart.values()) < 1e-5, apart
    yield ["way", "tokens/s", "of ours", "CPU s", "most memory, MiB", "before", "MiB on disk", "error"]
    ours = [found["wall"] for found in took["flex_model"]]
    for way, found in took.items():
        peak, before = (spread([one[n] for one in found], ",.0f") for n in ("peak", "before"))
        cpu = spread([one["cpu"] for one in found], ".1f")
        ratio = spread([a / one["wall"] for a, one in zip(ours, found, strict=True)], ".0%")
        rate = spread([tokens / one["wall"] for one in found], ",.0f")
        size = f"{found[0]['bytes'] / 2**20:,.0f}"
        yield [tools[way][0], rate, ratio, cpu, peak, before, size, f"{apart[way]:.0e}"]
