"""What the commands share: how a model is loaded, processes are started, and errors are told."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from flex_model.cli_models import SAFE, ModelError
from flex_model.cli_processes import start
from flex_model.errors import FlexModelError

__all__ = ["Cache", "check_start", "launch", "load", "started", "told"]

Cache = Annotated[
    Path, typer.Option(envvar="FLEX_MODEL_CACHE", file_okay=False, help="Where converted models are kept")
]


def started() -> bool:
    """Whether torchrun, or another command of ours, has started this process as one of several."""
    return "RANK" in os.environ


def check_start(tp: int) -> None:
    world = int(os.environ.get("WORLD_SIZE", tp))
    if started() and world != tp:
        raise ModelError(f"--tp {tp} was asked for, but torchrun started {world} processes.", page="split-impossible")


def load(folder: Path, tp: int, dtype: torch.dtype | str = "auto") -> torch.nn.Module:
    """The model in eval mode, split over ``tp`` processes, in its own dtype if no other is asked for."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig  # type: ignore[attr-defined]
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # there is one already
    options: dict[str, Any] = {"attn_implementation": "eager", "use_safetensors": True, "dtype": dtype, **SAFE}
    if tp > 1:
        options["distributed_config"] = DistributedConfig(tp_size=tp)
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, **options)
    if tp == 1:
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval()


def launch(worker: Callable[[Any], Any], job: Any, processes: int) -> dict[int, Any]:
    """``worker(job)`` in processes on this machine: what each returned."""
    if torch.cuda.device_count() < processes:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # NCCL takes one process a device: all of them go to the CPU
    Console(stderr=True).print(f"Starting {processes} processes.")
    try:
        return start(worker, job, processes)
    except SignalException as stopped:
        raise typer.Exit(128 + int(stopped.sigval)) from stopped
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message: Any = failure.message
        raise FlexModelError(
            f"process {rank} failed: {message['message'] if isinstance(message, dict) else message}",
            page="process-failed",
        ) from error


@contextmanager
def told(code: int = 2) -> Iterator[None]:
    """Our errors end the command with their one sentence, said by the first process only."""
    try:
        yield
    except FlexModelError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(code) from error
