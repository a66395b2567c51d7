"""A tuned lens of SmolLM2-135M, trained on texts that come with Python (``pydoc_data``): how far is each layer's
prediction from the model's on held-out text, read by the logit lens and by the tuned lens? And how far apart are the
parameters after a few steps on one process, with tensor parallelism over 3 and with FSDP2 over 2?

    python benchmarks/tuned_lens.py [--model FOLDER] [--steps 40] [--tokens 64] [--compare 4] [--held-out 8]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from worlds import run_world  # leaves this process one thread, so that it can fork

from flex_model import FlexModel
from flex_model.cli.models import find_model
from flex_model.lens import TunedLens, logit_lens

ROWS, LENGTH = 2, 64


def corpus(folder: Path, held_out: bool) -> list[dict[str, Tensor]]:
    """Batches of every tenth topic of ``help()``, or of the others."""
    from pydoc_data import topics

    from transformers import AutoTokenizer

    known = [text for _, text in sorted(topics.topics.items())]
    text = "\n\n".join(t for i, t in enumerate(known) if (i % 10 == 9) is held_out)
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", verbose=False).input_ids[0]
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return [{"input_ids": b} for b in rows.split(ROWS) if len(b) == ROWS]


def load(folder: Path, engine: str) -> FlexModel:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    keywords: dict[str, Any] = {}
    if engine != "alone":
        keywords["distributed_config"] = DistributedConfig(**{f"{engine}_size": dist.get_world_size()})
    return FlexModel(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **keywords).eval())


def few_steps(folder: Path, engine: str, steps: int, tokens: int, out: Path) -> float:
    """Seconds a step; this rank's parameters go to ``out``."""
    world, rank = dist.get_world_size(), dist.get_rank()
    batches = corpus(folder, held_out=False)[:steps]
    if engine == "fsdp":
        batches = [{k: v.chunk(world)[rank] for k, v in b.items()} for b in batches]
    lens, start = TunedLens(load(folder, engine)), time.perf_counter()
    lens.fit(batches, steps=steps, tokens=tokens)
    torch.save([p.detach() for p in lens.parameters()], out / f"{engine}-{rank}.pt")
    return (time.perf_counter() - start) / steps


def compare(folder: Path, steps: int, tokens: int, out: Path) -> None:
    print(f"{steps} steps of {tokens} tokens, one thread a process", flush=True)
    for engine, ranks in (("alone", 1), ("tp", 3), ("fsdp", 2)):
        seconds = max(run_world(ranks, few_steps, folder, engine, steps, tokens, out, timeout=1200))
        want = torch.load(out / "alone-0.pt", weights_only=True)
        found = [torch.load(out / f"{engine}-{r}.pt", weights_only=True) for r in range(ranks)]
        most = max(float((a - b).abs().max()) for rank in found for a, b in zip(rank, want, strict=True))
        largest = max(float(p.abs().max()) for p in want)
        print(f"{engine:>5} on {ranks}: {seconds:.1f} s a step, ", end="")
        print(f"{most:.1e} from one process at most, where parameters are up to {largest:.1e}", flush=True)


def train(folder: Path, steps: int, tokens: int, held_out: int) -> None:
    fm, batches = load(folder, "alone"), corpus(folder, held_out=True)[:held_out]
    lens, start = TunedLens(fm), time.perf_counter()
    lens.fit(corpus(folder, held_out=False), steps=steps, tokens=tokens)
    print(
        f"{steps} steps of {tokens} tokens: {time.perf_counter() - start:.0f} s, {torch.get_num_threads()} threads",
        flush=True,
    )
    with torch.no_grad():
        plain = torch.stack([logit_lens(fm, **b).divergence.mean((1, 2)) for b in batches]).mean(0)
        tuned = torch.stack([lens(**b).divergence.mean((1, 2)) for b in batches]).mean(0)
    print(f"KL(model | layer) in nats, mean over {len(batches) * ROWS * LENGTH} held-out tokens")
    print("layer  logit lens  tuned lens")
    for layer, (a, b) in enumerate(zip(plain.tolist(), tuned.tolist(), strict=True)):
        print(f"{layer:5}  {a:10.4f}  {b:10.4f}")
    below = bool((tuned < plain)[:-1].all())
    print(f"below at every layer but the last: {below}; the last equal: {bool(tuned[-1] == plain[-1])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    for name, default in (("steps", 40), ("tokens", 64), ("compare", 4), ("held-out", 8), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    folder = find_model(args.model, Path(".models"))
    if args.compare:
        with tempfile.TemporaryDirectory() as out:
            compare(folder, args.compare, args.tokens, Path(out))
    if args.steps:
        torch.set_num_threads(args.threads)
        train(folder, args.steps, args.tokens, args.held_out)


if __name__ == "__main__":
    main()
