"""Train a tuned lens and read each layer's prediction; the numbers are the same on any number of processes.

Run: python examples/tuned_lens.py
Run: torchrun --nproc-per-node 2 examples/tuned_lens.py             (tensor parallel)
Run: torchrun --nproc-per-node 2 examples/tuned_lens.py --fsdp2
``--model FOLDER``: transformers weights and a tokenizer, in place of a tiny random model. The text is this file.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

from flex_model import FlexModel
from flex_model.lens import TunedLens, logit_lens

ROWS, LENGTH = 6, 48


def save_tiny(folder: str) -> None:
    """Random weights, large enough for layers to differ."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=4)
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128, initializer_range=0.15)).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a folder of transformers weights")
    parser.add_argument("--fsdp2", action="store_true")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()

    world, rank, parts = int(os.environ.get("WORLD_SIZE", 1)), 0, 1
    keywords: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as tiny:
        save_tiny(tiny)  # a folder a process, and so before there is a group, in which one alone would write
        if world > 1:
            dist.init_process_group("gloo")
            rank, parts = dist.get_rank(), world if args.fsdp2 else 1
            keywords["distributed_config"] = DistributedConfig(**{"fsdp_size" if args.fsdp2 else "tp_size": world})
        folder = args.model or tiny
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **keywords).eval()

    text = Path(__file__).read_text()
    ids = AutoTokenizer.from_pretrained(folder)(text).input_ids if args.model else [ord(c) for c in text]
    rows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    batches = [{"input_ids": b.chunk(parts)[rank % parts]} for b in rows.split(ROWS) if len(b) == ROWS]

    fm = FlexModel(model)
    lens = TunedLens(fm)
    training = lens.fit(batches[1:], steps=args.steps, tokens=96)  # of each batch; the first is held out
    plain, tuned = logit_lens(fm, **batches[0]), lens(**batches[0])
    if rank == 0:
        print(f"loss {training.loss[0].mean():.4f} -> {training.loss[-1].mean():.4f}")
        print("KL(model | layer) on held-out rows, in nats")
        for layer, (a, b) in enumerate(zip(plain.divergence, tuned.divergence, strict=True)):
            print(f"layer {layer}: logit lens {a.mean():.4f}, tuned lens {b.mean():.4f}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
