"""SAELens and sparsify themselves, in an environment of their own (``make environments``), on stores and exports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from token_stores import SIZE, token_store

import flex_model
from flex_model.store.export import to_saelens

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import environments

sys.path.pop(0)

pytest.importorskip("datasets")
ENVIRONMENT = "saes"
pytestmark = pytest.mark.skipif(
    not environments.is_made(ENVIRONMENT, environments.TESTED[ENVIRONMENT]),
    reason=f"needs benchmarks/.peers/{ENVIRONMENT} (SAELens, sparsify): make environments",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 41 contexts, of which 40 are whole, its export, and the rows that SAELens must see."""
    from safetensors.torch import save_file

    at = tmp_path_factory.mktemp("peers")
    store = token_store(at / "acts", [[SIZE] * 20, [5, *[SIZE] * 20]])
    made = to_saelens(
        store,
        at / "out",
        hook_names={"model.layers.1": "blocks.1.hook_resid_post"},
        dtype="float32",
        incomplete="drop",
        shard_bytes=4000,
    )
    assert made.left_out == 5 and len(made.files) > 3
    keep = [row for row in range(len(store)) if not 20 * SIZE <= row < 20 * SIZE + 5]
    whole = {"acts": store["model.layers.1"].torch(keep).float(), "token_ids": store["token_ids"].torch(keep)}
    save_file(whole, at / "rows.safetensors")
    return at


def run(task: str, folder: Path) -> dict[str, Any]:
    """``in_saes.py`` with the source of FlexModel that is being tested."""
    here, source = Path(__file__).parent, Path(flex_model.__file__).parents[1]
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": ""}
    env = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", **offline}
    command = [environments.python_of(ENVIRONMENT), here / "in_saes.py", task, folder]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_saelens_trains_from_the_directory(folder: Path) -> None:
    found = run("saelens_directory", folder)
    assert found["same"] and found["same_tokens"]
    assert found["before"] > 0.5 and found["after"] < 0.1


def test_saelens_trains_from_batches(folder: Path) -> None:
    found = run("saelens_batches", folder)
    assert found["taken"] == 400
    assert found["before"] > 0.5 and found["after"] < 0.1


def test_saelens_trains_several_from_batches(folder: Path) -> None:
    found = run("saelens_hooks", folder)
    assert min(found["before"]) > 0.5 and max(found["after"]) < 0.1


def test_sparsify_trains_from_a_replay(folder: Path) -> None:
    found = run("sparsify_replay", folder)
    assert found["before"].keys() == found["after"].keys() == {"layers.1", "layers.1.mlp"}
    assert min(found["before"].values()) > 0.5 and max(found["after"].values()) < 0.1
    assert set(found["saved"]) > {"layers.1", "layers.1.mlp", "state.pt"}
    half, whole, same = found["steps"]
    assert half * 2 == whole == same and max(found["resumed"].values()) < 0.1
    name, unexplained = found["transcoder"]
    assert name == "layers.1.mlp" and unexplained < 0.1
