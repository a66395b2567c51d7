"""Attention-pattern measures: query by query in plain torch, with padding on either side, and whatever is parallel."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from test_lens import placed
from torch import Tensor
from worlds import run_world

from flex_model import FlexModel, FlexModelError
from flex_model.errors import ComponentError
from flex_model.lens import AttentionPatterns, attention_patterns

MEASURES = [f.name for f in fields(AttentionPatterns)]


def batch(padding: str = "none") -> dict[str, Tensor]:
    ids = torch.randint(1, 9, (4, 12), generator=torch.Generator().manual_seed(2))  # so few that they repeat
    mask = torch.ones_like(ids)
    for row, count in enumerate((0, 3, 1, 5) if padding != "none" else ()):
        mask[row, :count] = 0
    return {"input_ids": ids, "attention_mask": mask.flip(1) if padding == "right" else mask}


def oracle(model: Any, given: dict[str, Tensor]) -> dict[str, list[list[float]]]:
    """One query at a time."""
    with torch.no_grad():
        patterns = model(**given, output_attentions=True).attentions
    out: dict[str, list[list[float]]] = {m: [] for m in MEASURES}
    for pattern in patterns:
        for measure in MEASURES:
            out[measure].append([])
        for head in range(pattern.shape[1]):
            found: dict[str, list[float]] = {m: [] for m in MEASURES}
            for row, tokens in enumerate(given["input_ids"].tolist()):
                real = [i for i, r in enumerate(given["attention_mask"][row].tolist()) if r]
                for q in real:
                    p = pattern[row, head, q].double().tolist()
                    keys = {
                        "previous": [q - 1] if q - 1 in real else [],
                        "current": [q],
                        "first": real[:1],
                        "duplicate": [k for k in real if k < q and tokens[k] == tokens[q]],
                        "induction": [k + 1 for k in real if k + 1 < q and tokens[k] == tokens[q]],
                    }
                    for measure, those in keys.items():
                        found[measure] += [sum(p[k] for k in those)] if those else []
                    found["entropy"].append(-sum(x * math.log(x) for x in p if x > 0))
                    found["distance"].append(sum(x * abs(q - k) for k, x in enumerate(p)))
            for measure, values in found.items():
                out[measure][-1].append(sum(values) / len(values))
    return out


def compare(found: AttentionPatterns, want: dict[str, list[list[float]]]) -> None:
    for measure in MEASURES:
        torch.testing.assert_close(getattr(found, measure), torch.tensor(want[measure]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])  # llama: two query heads to a key-value head
def test_every_measure_by_hand(family: str, padding: str) -> None:
    model = models.make(family)
    compare(attention_patterns(FlexModel(model), **batch(padding)), oracle(model, batch(padding)))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("llama")
    models.make("llama").save_pretrained(folder)  # type: ignore[operator]
    return str(folder)


def _spread(engine: str, path: str) -> list[list[float]]:
    model, mine = placed(engine, path)
    getattr(model, "module", model).set_attn_implementation("eager")
    fm = FlexModel(model)
    first, again = (attention_patterns(fm, **mine(batch("left"))) for _ in range(2))
    return [[getattr(f, m).tolist() for m in MEASURES] for f in (first, again)]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "tp"])
def test_the_same_on_two_ranks(engine: str, path: str) -> None:
    want = oracle(models.make("llama"), batch("left"))
    for rank in run_world(2, _spread, engine, path):
        for measures in rank:  # layouts are found in the first forward, and known in the second
            compare(AttentionPatterns(*map(torch.tensor, measures)), want)


def test_what_no_query_can_have_is_nan() -> None:
    found = attention_patterns(FlexModel(models.make("llama")), torch.arange(1, 7)[None])
    assert found.induction.isnan().all() and found.duplicate.isnan().all()
    assert not found.previous.isnan().any()


def test_table_and_picture() -> None:
    pytest.importorskip("pandas")
    pytest.importorskip("plotly")
    found = attention_patterns(FlexModel(models.make("llama")), **batch())
    table = found.to_dataframe()
    assert list(table.columns) == ["layer", "head", *MEASURES] and len(table) == 8
    assert table["first"][5] == found.first[1, 1]
    assert found.plot("entropy").data[0].z[1][2] == found.entropy[1, 2]
    with pytest.raises(FlexModelError, match="measure='sink' is unknown"):
        found.plot("sink")  # type: ignore[arg-type]


def test_bad_input() -> None:
    model: Any = models.make("llama")
    fm = FlexModel(model)
    with pytest.raises(FlexModelError, match=r"expected token ids \(B, S\) as input_ids, got NoneType"):
        attention_patterns(fm, inputs_embeds=torch.zeros(1, 2, 32))
    with pytest.raises(FlexModelError, match="expected an attention_mask of the tokens' shape"):
        attention_patterns(fm, **{**batch(), "attention_mask": torch.ones(4, 1, 12, 12)})
    model.set_attn_implementation("sdpa")
    with pytest.raises(ComponentError, match="attn_implementation='eager'"):
        attention_patterns(fm, **batch())
