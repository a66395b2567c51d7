"""What the parts of the harvest's benchmark run on: SmolLM2, whole or split, or a random Llama; and token ids."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn


def load(model: str | None, *, device: str = "cpu", axis: str | None = None, layers: int = 8, width: int = 2048) -> Any:
    """A folder of weights in float32, split over the world along ``axis``; without one a random Llama in bf16."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    options: dict[str, Any] = {}
    if axis is not None:
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(**{f"{axis}_size": int(os.environ["WORLD_SIZE"])})
    if model is None:
        return _random(layers, width, device)
    found = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **options)
    return (found if axis else found.to(device)).eval().requires_grad_(False)


def _random(layers: int, width: int, device: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": width * 7 // 2, "num_attention_heads": width // 128}
    config = LlamaConfig(**sizes, num_key_value_heads=min(8, width // 128), num_hidden_layers=layers, vocab_size=32000)
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(kept)


def batches(tokens: int, samples: int, length: int, *, device: str = "cpu") -> list[dict[str, Tensor]]:
    """Random ids; the first ones are the same whatever the number of tokens."""
    draw = torch.Generator().manual_seed(0)
    count = -(-tokens // (samples * length))
    return [{"input_ids": torch.randint(0, 32000, (samples, length), generator=draw).to(device)} for _ in range(count)]


def by_hand(model: nn.Module, data: list[dict[str, Tensor]], chosen: list[int]) -> dict[str, Tensor]:
    """The residuals behind chosen layers, by plain hooks: ``{"@resid_post.5": (rows, width)}``."""
    rows: dict[str, list[Tensor]] = {f"@resid_post.{layer}": [] for layer in chosen}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            rows[name].append(value.detach().flatten(0, 1).cpu().clone())

        return hook

    handles = [model.model.layers[n].register_forward_hook(keep(f"@resid_post.{n}")) for n in chosen]
    with torch.no_grad():
        for batch in data:
            model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found) for name, found in rows.items()}


def error(found: Tensor, want: Tensor) -> float:
    """Relative, of the norm."""
    assert found.shape == want.shape, (found.shape, want.shape)
    return float((found.double() - want.double()).norm() / want.double().norm())
