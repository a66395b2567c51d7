"""Ready-made editing functions, to be passed to ``fm.edit`` or a HookFunction.

>>> import torch
>>> from flex_model import edits
>>> edits.add(torch.tensor([1.0, 2.0]), scale=2.0)(torch.zeros(1, 2)).tolist()
[[2.0, 4.0]]

Each says how it runs: those of single elements on every rank's own shard, where nothing moves. ``positions=`` and
``when=`` say at which tokens and in which part of a generation. ``to_json`` and ``from_json`` keep them.
"""

from flex_model.edits.preset import Preset, compose
from flex_model.edits.saved import from_json, to_json
from flex_model.edits.tokens import LowRank, keep_only, module, project_out, sae
from flex_model.edits.values import add, clamp, mean, noise, patch, patch_rows, replace, resample, scale, zero

__all__ = [
    "LowRank",
    "Preset",
    "add",
    "clamp",
    "compose",
    "from_json",
    "keep_only",
    "mean",
    "module",
    "noise",
    "patch",
    "patch_rows",
    "project_out",
    "replace",
    "resample",
    "sae",
    "scale",
    "to_json",
    "zero",
]
