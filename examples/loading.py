"""What probe.py and train_sae.py share: a model on one process or split over torchrun's, and its tokens."""

import argparse
import os
import tempfile
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from flex_model import FlexModel

Rows = TypeVar("Rows", Tensor, list[int])


class Job(NamedTuple):
    fm: FlexModel
    layer: int
    tokens: Callable[[list[str]], dict[str, Tensor]]
    mine: Callable[[Rows], Rows]  # this rank's rows of a batch
    show: Callable[[str], None]


def start() -> Job:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="the folder of a model, with its tokenizer")
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--fsdp2", action="store_true")
    asked = parser.parse_args()
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    part, parts = (rank, world) if asked.fsdp2 else (0, 1)  # under tensor parallelism every rank has the whole batch
    return Job(
        FlexModel(_model(asked.model, world, asked.fsdp2)),
        asked.layer,
        _bytes if asked.model is None else _tokenizer(asked.model),
        lambda rows: rows[part * len(rows) // parts : (part + 1) * len(rows) // parts],
        print if rank == 0 else lambda line: None,
    )


def _model(folder: str | None, world: int, fsdp2: bool) -> torch.nn.Module:
    """Without a folder a tiny random one that reads bytes."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    sizes = dict(vocab_size=256, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
    split = {"fsdp_size": world} if fsdp2 else {"tp_size": world}
    options = {"distributed_config": DistributedConfig(**split)} if world > 1 else {}
    with tempfile.TemporaryDirectory() as tiny:
        if folder is None:
            torch.manual_seed(0)
            LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tiny)  # every rank its own: before ranks are known
        if world > 1:
            dist.init_process_group("gloo")
        return AutoModelForCausalLM.from_pretrained(folder or tiny, **options).eval()


def _bytes(texts: list[str]) -> dict[str, Tensor]:
    lengths = torch.tensor([len(t) for t in texts])
    ids = torch.tensor([list(t.ljust(int(lengths.max())).encode("ascii", "replace")) for t in texts])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


def _tokenizer(folder: str) -> Callable[[list[str]], dict[str, Tensor]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return lambda texts: dict(tokenizer(texts, padding=True, return_tensors="pt"))
