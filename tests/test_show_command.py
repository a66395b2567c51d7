"""``flex-model show``: what it draws of a model that is nowhere is what ``fm.show`` finds where the model runs."""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import models
import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner
from worlds import run_world

from flex_model import FlexModel
from flex_model.cli import app
from flex_model.cli.models import ModelError
from flex_model.cli.show import sketch
from flex_model.cli.spread import Spread
from flex_model.show import Outline

BATCH, LENGTH = 2, 6


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """In a process of its own: torch keeps meshes of worlds that are gone, and finds their groups in later ones. On one
    thread: a pool of threads that a command has started in this process is dead in its child."""
    with mp.get_context("fork").Pool(1, torch.set_num_threads, (1,)) as pool:
        return pool.apply_async(function, args).get(timeout=120)


def rows(outline: Outline, local: bool = True) -> dict[str, Any]:
    """Of every value the shape, this rank's and the placements; of every parameter too."""
    found: dict[str, Any] = {}
    for node in outline.root.walk():
        name = node.row.name
        for v in node.row.values:
            found[f"{name} {v.side}[{v.index}]"] = v.shape, v.local if local else None, v.placements, v.dtype
        for p in node.row.parameters:
            found[f"{name}.{p.name}"] = p.shape, p.local, p.placements, p.same_as
        found[name] = node.row.kind, node.row.stages, node.size, node.here
    return found


def _sketched(config: Any, spread: Spread, local: bool) -> dict[str, Any]:
    return rows(sketch(config, spread, batch=BATCH, length=LENGTH), local)


def _refused(config: Any, spread: Spread) -> str:
    try:
        sketch(config, spread)
    except ModelError as error:
        return str(error)
    return ""


def _real(family: str, path: Path, sizes: dict[str, int]) -> Any:
    from transformers.distributed import DistributedConfig

    kind = type(models.make(family))
    split = {"distributed_config": DistributedConfig(**sizes)} if sizes else {}
    model = kind.from_pretrained(path, attn_implementation="eager", **split).eval()
    model.config.use_cache = False
    different = dist.get_rank() // sizes.get("tp_size", 1) if "fsdp_size" in sizes else 0
    ids = (torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) + different) % 66
    batch = {"input_ids": ids, "use_cache": False}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids
    return rows(FlexModel(model).show(batch).outline, local="pp_size" not in sizes)


SPREADS = {"tp": Spread(tp=2), "fsdp": Spread(fsdp=2), "pp": Spread(pp=2), "tp and fsdp": Spread(tp=2, fsdp=2)}
CASES = [
    *((spread, family) for spread in ("tp", "fsdp", "pp") for family in ("llama", "qwen3_moe")),
    ("tp and fsdp", "llama"),
]


@pytest.mark.parametrize(("spread", "family"), CASES)
def test_a_sketch_is_what_a_real_model_shows(spread: str, family: str, tmp_path: Path) -> None:
    model = models.make(family)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(tmp_path)
    over = SPREADS[spread]
    real = run_world(over.processes, _real, family, tmp_path, over.config_sizes)[0]
    mine = apart(_sketched, model.config, over, spread != "pp")
    print(f"{family} over {spread}: {len(real)} rows")
    wrong = {k: (mine.get(k), v) for k, v in real.items() if mine.get(k) != v}
    assert not wrong and mine.keys() == real.keys()


@pytest.mark.parametrize(
    ("spread", "family", "words"),
    [
        ("tp", "gpt2", "has no `tp_plan`"),
        ("fsdp", "t5", "`fsdp_plan` names none"),
        ("fsdp", "gpt2", "`fsdp_plan`"),
    ],
)
def test_what_transformers_cannot_split(spread: str, family: str, words: str) -> None:
    config = models.make(family).config
    config.architectures = [type(models.make(family)).__name__]
    assert words in apart(_refused, config, SPREADS[spread])


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "t5", "bert"])
def test_on_one_process(family: str, tmp_path: Path) -> None:
    model = models.make(family)
    model.save_pretrained(tmp_path)
    model.config.architectures = [type(model).__name__]
    assert apart(_sketched, model.config, Spread(), True) == _real(family, tmp_path, {})


# -- the command -------------------------------------------------------------------------------------------------
class Done(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str


def _invoked(arguments: list[str]) -> Done:
    done = CliRunner().invoke(app, ["show", *arguments])
    return Done(done.exit_code, done.stdout, done.stderr)


def run(*arguments: object) -> Done:
    done: Done = apart(_invoked, list(map(str, arguments)))
    return done


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration without weights, of a model for no machine."""
    from transformers import LlamaConfig

    path = tmp_path_factory.mktemp("large")
    large = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    large.save_pretrained(path)
    return path


def test_a_model_for_no_machine(config: Path, tmp_path: Path) -> None:
    done = run("--model", config, "--tp", 8, "--fsdp", 16, "--batch", 1, "--length", 512, "--out", tmp_path / "x.svg")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "70.6B parameters; 551M on rank 0 of 128 (fsdp 16 x tp 8)" in lines[0]
    assert any("layers.0-79 x80" in line for line in lines)
    up = next(line for line in lines if "up_proj" in line)
    assert all(word in up for word in ("(16, 512, 28672) bfloat16", "(1, 512, 3584)", "fsdp: S(0), tp: S(2)"))
    assert "Wrote" in lines[-1] and (tmp_path / "x.svg").exists()


def test_depth_and_stages(config: Path) -> None:
    lines = run("--model", config / "config.json", "--pp", 4, "--depth", 2).stdout.splitlines()
    assert any("layers ..." in line for line in lines) and not any("x20" in line for line in lines)
    lines = run("--model", config / "config.json", "--pp", 4, "--depth", 3).stdout.splitlines()
    assert [line.split()[-1] for line in lines if "x20 ..." in line] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tp", 3), "does not divide the model's 64 attention heads and 8 key-value heads"),
        (("--pp", 2, "--tp", 2), "give --pp alone"),
        (("--pp", 99), "more than the model's 80 layers"),
    ],
)
def test_what_cannot_be_split(config: Path, options: tuple[Any, ...], words: str) -> None:
    done = run("--model", config, *options)
    assert done.exit_code == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1


def test_no_model(tmp_path: Path) -> None:
    done = run("--model", tmp_path / "none")
    assert done.exit_code == 2 and "no such file or folder" in done.stderr
    (tmp_path / "config.json").write_text("{}")
    done = run("--model", tmp_path)
    assert done.exit_code == 2 and "cannot read its config.json" in done.stderr
