"""``Spread``: over which processes a command splits its model, and which rows of a batch each of them gets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from flex_model.cli.models import SAFE, ModelError

__all__ = ["Fsdp", "Pp", "Spread", "Tp"]

Tp = Annotated[int, typer.Option(min=1, help="Processes to split each layer over")]
Fsdp = Annotated[int, typer.Option(min=1, help="Processes to split the weights over, and the rows of a batch")]
Pp = Annotated[int, typer.Option(min=1, help="Processes that run some of the layers each")]


@dataclass(frozen=True, slots=True)
class Spread:
    """Processes by axis, as transformers' ``DistributedConfig`` has them; one process unless it says more."""

    tp: int = 1
    fsdp: int = 1
    pp: int = 1

    @property
    def processes(self) -> int:
        return self.tp * self.fsdp * self.pp

    def __str__(self) -> str:
        named = [f"{axis}={size}" for axis, size in self._sizes.items() if size > 1]
        return f"over {self.processes} processes ({', '.join(named)})" if named else "on one process"

    @property
    def _sizes(self) -> dict[str, int]:
        return {"tp": self.tp, "fsdp": self.fsdp, "pp": self.pp}

    @property
    def config_sizes(self) -> dict[str, Any]:
        """What transformers' ``DistributedConfig`` takes."""
        return {f"{axis}_size": size for axis, size in self._sizes.items() if size > 1}

    @property
    def asked(self) -> str:
        """The options that say this."""
        return " ".join(f"--{axis} {size}" for axis, size in self._sizes.items() if size > 1) or "--tp 1"

    def check(self, folder: Path) -> Any:
        """The model's configuration, if it can be split like this. Raises ModelError."""
        from transformers import AutoConfig

        started = int(os.environ.get("WORLD_SIZE", self.processes)) if "RANK" in os.environ else self.processes
        if started != self.processes:
            raise ModelError(
                f"{self.asked} was asked for, but torchrun started {started} processes.", page="split-impossible"
            )
        try:
            config = AutoConfig.from_pretrained(folder, **SAFE).get_text_config()
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ModelError(f"--model {folder}: transformers cannot read its config.json: {reason}") from error
        self.check_config(config, str(folder))
        return config

    def check_config(self, config: Any, model: str) -> None:
        """Raises ModelError if a model of this configuration cannot be split like this."""
        if self.pp > 1 and self.tp * self.fsdp > 1:
            raise ModelError(
                f"{self.asked}: transformers runs its pipelines without other axes; give --pp alone.",
                page="split-impossible",
            )
        heads, layers = getattr(config, "num_attention_heads", 0), getattr(config, "num_hidden_layers", 0)
        if not heads:
            raise ModelError(
                f"--model {model}: a {config.model_type} model has no attention heads.", page="split-impossible"
            )
        groups = getattr(config, "num_key_value_heads", None) or heads
        common = gcd(heads, groups)
        if common % self.tp:
            fitting = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            raise ModelError(
                f"--tp {self.tp} does not divide the model's {heads} attention heads and {groups} key-value heads; "
                f"these do: {fitting}.",
                page="split-impossible",
            )
        if self.pp > layers:
            raise ModelError(f"--pp {self.pp} is more than the model's {layers} layers.", page="split-impossible")

    def load(self, folder: Path, dtype: torch.dtype | str = "auto") -> nn.Module:
        """The model in eval mode, spread over the processes that are there, in its own dtype if no other is given."""
        from transformers import AutoModelForCausalLM
        from transformers.distributed import DistributedConfig  # type: ignore[attr-defined]
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # there is one already
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        options: dict[str, Any] = {"attn_implementation": "eager", "use_safetensors": True, "dtype": dtype, **SAFE}
        if self.processes > 1:
            options["distributed_config"] = DistributedConfig(**self.config_sizes)
        model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, **options)
        if self.processes == 1:
            model.to("cuda" if torch.cuda.is_available() else "cpu")
        return model.eval()

    def mine(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The rows that this process runs, on its device. Where they do not divide evenly, every process runs all, and
        results hold them several times."""
        device = next(model.parameters()).device
        mesh: Any = getattr(model, "_device_mesh", None)
        rows = len(next(iter(batch.values())))
        if self.fsdp == 1 or rows % self.fsdp:
            return {k: v.to(device) for k, v in batch.items()}
        part = mesh["fsdp"].get_local_rank()
        return {k: v.chunk(self.fsdp)[part].to(device) for k, v in batch.items()}
