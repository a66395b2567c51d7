"""A model's registered hooks in a folder, and back: ``hooks.json`` to read and change by hand, tensors beside it.

>>> fm.save_hooks("hooks")              # doctest: +SKIP
>>> other.load_hooks("hooks")           # doctest: +SKIP

A name may be made a pattern by hand (``"model.layers.*.mlp"``): it is matched when hooks are loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from flex_model.core.hook_function import HookFunction
from flex_model.edits.saved import from_json, to_json
from flex_model.errors import EditError

if TYPE_CHECKING:
    from flex_model.core.bound import Bound
    from flex_model.core.flex_model import FlexModel

__all__ = ["load_hooks", "save_hooks"]

VERSION = 1
_SETTINGS = ("expected_shape", "editing_function", "unpack_idx", "capture", "select", "run", "axes", "layout", "random")


def save_hooks(fm: FlexModel, path: str | Path) -> Path:
    """Write what is registered on ``fm``; the lowest rank does. What cannot be saved is an error, and nothing is
    written then."""
    tensors: dict[str, Tensor] = {}
    rows = [_row(fm, b, tensors) for b in fm._runtime.bounds if not b.temporary]
    folder = Path(path)
    if not dist.is_initialized() or dist.get_rank() == fm._runtime.whole.main:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.clone() for k, v in tensors.items()}, folder / "tensors.part")
        (folder / "hooks.part").write_text(json.dumps({"version": VERSION, "hooks": rows}, indent=1) + "\n")
        os.replace(folder / "tensors.part", folder / "tensors.safetensors")
        os.replace(folder / "hooks.part", folder / "hooks.json")
    return folder


def _row(fm: FlexModel, bound: Bound, tensors: dict[str, Tensor]) -> dict[str, Any]:
    hook = bound.hook
    default = HookFunction(hook.module_name, editing_function=hook.editing_function)
    try:
        told = {
            name: to_json(value, tensors)
            for name in _SETTINGS
            if (value := getattr(hook, name)) is not getattr(default, name) or name == "editing_function"
        }
    except EditError as error:
        raise EditError(f"{bound.where}: {error.message}", page="not-saved") from error
    groups = sorted(fm.get_hook_function_groups(hook) - {"all"})
    settings = {k: v for k, v in told.items() if v is not None}
    return {
        "module": hook.module_name,
        "hook_type": bound.hook_type,
        **settings,
        **({"groups": groups} if groups else {}),
    }


def load_hooks(fm: FlexModel, path: str | Path) -> list[RemovableHandle]:
    """Register what ``save_hooks`` wrote, with its groups. All ranks read it. Where one of them does not fit, none is
    registered."""
    from safetensors.torch import load_file

    folder = Path(path)
    try:
        told = json.loads((folder / "hooks.json").read_text())
        tensors = load_file(folder / "tensors.safetensors")
        rows, version = told["hooks"], told["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EditError(f"{folder} holds no saved hooks: {type(error).__name__}: {error}.", page="not-saved") from error
    if version != VERSION:
        raise EditError(
            f"{folder} was written in form {version}, and this version reads form {VERSION}.", page="not-saved"
        )
    made = [(row, hook) for row in rows for hook in _hooks(fm, row, tensors)]
    handles: list[RemovableHandle] = []
    try:
        for row, hook in made:
            handles.append(fm._register(hook, row["hook_type"]))
        for row, hook in made:
            for group in row.get("groups", ()):
                fm.update_hook_groups([hook], group)  # type: ignore[arg-type]
    except Exception:
        for handle in handles:
            handle.remove()
        raise
    return handles


def _hooks(fm: FlexModel, row: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[HookFunction]:
    settings = {k: from_json(v, tensors) for k, v in row.items() if k in _SETTINGS}
    unknown = set(row) - {*_SETTINGS, "module", "hook_type", "groups"}
    if unknown or "module" not in row or "hook_type" not in row:
        what = f"the unknown {sorted(unknown)[0]!r}" if unknown else "no module or hook_type"
        raise EditError(f"a saved hook has {what}; write it again with fm.save_hooks.", page="not-saved")
    of = "parameter" if row["hook_type"] == "tensor" else "module"
    fm._runtime.look()
    return [HookFunction(name, **settings) for _, name in fm._runtime.names.match(row["module"], of=of)]
