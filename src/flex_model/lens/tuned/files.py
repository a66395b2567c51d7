"""The files of a tuned lens, as the package ``tuned-lens`` (0.2) has them: ``config.json`` and ``params.pt``."""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flex_model import FlexModelError
from flex_model.lens.logit import Unembedding

__all__ = ["read_translators", "write_lens"]

_KIND = "linear_tuned_lens"


def write_lens(folder: Path, state: Mapping[str, Tensor], unembed: Unembedding, config: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state), folder / "params.pt")
    content = {
        "base_model_name_or_path": str(getattr(config, "name_or_path", "") or ""),
        "d_model": state["0.bias"].shape[0],
        "num_hidden_layers": len(state) // 2,
        "bias": True,
        "base_model_revision": None,
        "unembed_hash": _hash(unembed),
        "lens_type": _KIND,
    }
    (folder / "config.json").write_text(json.dumps(content))


def read_translators(folder: Path, layers: int, width: int, unembed: Unembedding) -> dict[str, Tensor]:
    """``{"0.weight": (D, D), "0.bias": (D,), ...}`` in float32, if they fit."""
    try:
        config = json.loads((folder / "config.json").read_text())
        state = torch.load(folder / "params.pt", weights_only=True, map_location="cpu")
        found = (config.get("lens_type", _KIND), config["num_hidden_layers"], config["d_model"])
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    except (OSError, ValueError, LookupError, AttributeError, RuntimeError, pickle.UnpicklingError) as error:
        raise FlexModelError(
            f"{str(folder)!r} is no tuned lens: expected config.json and params.pt in it, found {error!r}.",
            page="bad-argument",
        ) from error
    wanted = {f"{i}.{n}": s for i in range(layers) for n, s in (("weight", (width, width)), ("bias", (width,)))}
    if found != (_KIND, layers, width) or shapes != wanted:
        raise FlexModelError(
            f"the lens in {str(folder)!r} does not fit the model: expected a {_KIND} of {layers} layers and width "
            f"{width}, found {found[0]!r} of {found[1]} layers and width {found[2]}, with {len(shapes)} tensors.",
            page="bad-argument",
        )
    if config.get("unembed_hash") not in (None, _hash(unembed)):
        warnings.warn(
            f"the lens in {str(folder)!r} was trained with another unembedding than this model's.", stacklevel=3
        )
    return {name: tensor.float() for name, tensor in state.items()}


def _hash(unembed: Unembedding) -> str:
    """What that package compares to tell whether a lens is of this model: of the weight as numpy prints it."""
    import numpy

    weight = next(unembed.head.parameters()).detach().float().cpu().numpy()
    return hashlib.sha256(numpy.array_str(weight, precision=1).encode()).hexdigest()
