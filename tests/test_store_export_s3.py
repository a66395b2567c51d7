"""A store in a bucket, exported to this machine; each side is a process of its own, as in test_store_s3.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_store_s3 import MISSING, WRITE, endpoint, run  # noqa: F401

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")

EXPORT = """
import sys
import torch
from safetensors.torch import load_file
from stores import expected
from flex_model.store import ActivationStore
from flex_model.store.export import to_arrow, to_parquet, to_safetensors

store, out, whole = ActivationStore(sys.argv[1]), sys.argv[2], expected(9, 1)
made = to_safetensors(store, out + "/safetensors", shard_bytes=900)
each = [load_file(made.path / name) for name in made.files]
assert len(each) > 2
for name, value in whole.items():
    assert torch.equal(torch.cat([part[name] for part in each]), value), name
for export in (to_parquet, to_arrow):
    assert export(store, out + "/" + export.__name__, dtype="float32").rows == len(store)
"""


def test_export_from_a_bucket(endpoint: str, tmp_path: Path) -> None:  # noqa: F811
    run(endpoint, WRITE, "s3://acts/exported", "create", "9", "commit")
    run(endpoint, EXPORT, "s3://acts/exported", str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["safetensors", "to_arrow", "to_parquet"]
