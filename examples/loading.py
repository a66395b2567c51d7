"""What the examples share: a model on one process, or spread over those that torchrun has started.

MODEL: a folder of transformers weights with its tokenizer, a GGUF, ``smollm2`` (the default) or ``tiny-llama``.
SPREAD: ``tp`` (the default), over which each layer is split, or ``fsdp``, whose processes take a part of the rows each.
"""

import atexit
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

from flex_model import FlexModel
from flex_model.cli.models import find_model


class Job(NamedTuple):
    """``mine`` takes this process's rows of a batch; ``say`` prints and ``show`` draws on the first one only."""

    fm: FlexModel
    tokens: Callable[..., dict[str, Tensor]]
    decode: Callable[[Any], str]
    mine: Callable[[Any], Any]
    say: Callable[..., None]
    show: Callable[[Any], None]


def start() -> Job:
    name, spread = os.environ.get("MODEL", "smollm2"), os.environ.get("SPREAD", "tp")
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    folder = find_model(name, Path(__file__).parents[1] / ".models")
    options: dict[str, Any] = {"attn_implementation": "eager", "dtype": torch.float32}
    if world > 1:
        options["distributed_config"] = DistributedConfig(**{f"{spread}_size": world})
        atexit.register(dist.destroy_process_group)
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokens(*texts: str) -> dict[str, Tensor]:
        """Padded on the right to the longest."""
        rows = [tokenizer(text)["input_ids"] for text in texts]
        longest = max(map(len, rows))
        ids, mask = ([(r + [0] * longest)[:longest] for r in many] for many in (rows, [[1] * len(r) for r in rows]))
        return mine({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)})

    def mine(batch: Any) -> Any:
        if isinstance(batch, dict):
            return {key: mine(value) for key, value in batch.items()}
        parted = world > 1 and spread == "fsdp" and len(batch) % world == 0
        return batch.chunk(world)[rank] if parted else batch

    def say(*words: object) -> None:
        if rank == 0:
            print(*words)

    return Job(FlexModel(model), tokens, tokenizer.decode, mine, say, show if rank == 0 else lambda figure: None)


def show(figure: Any) -> None:
    """A plotly figure as a picture, where a notebook runs; else in the folder OUT, if that is given."""
    if os.environ.get("OUT"):
        figure.write_html(Path(os.environ["OUT"]) / f"{figure.layout.title.text[:30]}.html")
    elif "JPY_PARENT_PID" in os.environ:
        from IPython.display import Image, display

        display(Image(figure.to_image("png", scale=1.5)))
