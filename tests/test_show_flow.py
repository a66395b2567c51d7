"""How values flow in a block: as its code says, and the same under every engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import models
import pytest
import torch
from test_families import place
from test_pipeline_transformers import load
from torch import Tensor, nn
from worlds import run_world

from flex_model import FlexModel

BLOCK = {
    ("in", "input_layernorm"),
    ("input_layernorm", "self_attn"),
    ("in", "self_attn"),  # the mask and the rotation
    ("in", "+"),
    ("self_attn", "+"),
    ("+", "post_attention_layernorm"),
    ("post_attention_layernorm", "mlp"),
    ("+", "+ 2"),
    ("mlp", "+ 2"),
    ("+ 2", "out"),
}
MLP = {
    ("in", "gate_proj"),
    ("gate_proj", "act_fn"),
    ("in", "up_proj"),
    ("act_fn", "\u00d7"),
    ("up_proj", "\u00d7"),
    ("\u00d7", "down_proj"),
    ("down_proj", "out"),
}


def _flows(fm: FlexModel, batch: Any) -> dict[str, list[tuple[str, str]]]:
    return {name: list(flow.arrows) for name, flow in fm.show(batch).outline.flows.items()}


def test_a_block_of_llama() -> None:
    flows = _flows(FlexModel(models.make("llama")), models.inputs("llama"))
    assert set(flows["model.layers.1"]) == BLOCK and set(flows["model.layers.0.mlp"]) == MLP
    assert {("layers.0", "layers.1"), ("layers.1", "norm")} <= set(flows["model"])
    into = {a for a, b in flows["model.layers.0.self_attn"] if b == "o_proj"}
    assert into == {"q_proj", "k_proj", "v_proj", "in"}


def _under(engine: str, path: Path) -> Any:
    if engine == "pp":
        fm = FlexModel(load("llama", path)[1])
        return _flows(fm, models.inputs("llama"))
    placed = place(engine, models.make("llama"), path)
    return _flows(FlexModel(placed.model), {k: placed.mine(v) for k, v in models.inputs("llama").items()})


def _drawn(path: Path) -> list[str]:
    placed = place("tp", models.make("llama"), path)
    return list(FlexModel(placed.model).show(models.inputs("llama")).outline.diagrams)


def test_ranks_draw(tmp_path: Path) -> None:
    models.make("llama").save_pretrained(tmp_path)
    for names in run_world(2, _drawn, tmp_path):
        assert "model.layers.0" in names


@pytest.mark.parametrize("engine", ["tp", "fsdp2", "ddp", "pp"])
def test_flows_are_those_of_one_process(engine: str, tmp_path: Path) -> None:
    plain = models.make("llama")
    plain.save_pretrained(tmp_path)
    want = _flows(FlexModel(plain), models.inputs("llama"))
    for flows in run_world(2, _under, engine, tmp_path):
        for name in ("model.layers.0", "model.layers.1", "model.layers.0.mlp", "model.layers.1.self_attn"):
            assert set(flows[name]) == set(want[name]), name
        assert ("layers.0", "layers.1") in flows["model"]


class Streams(nn.Module):
    """Writes in place, looks through a view, and uses a part twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y += self.b(y.view(-1, 4)).view_as(y)
        return self.c(self.c(y[:, :2]) * 2.0)


def test_writes_in_place_views_and_second_calls() -> None:
    flows = _flows(FlexModel(nn.Sequential(Streams())), torch.ones(2, 3, 4))
    assert set(flows["0"]) == {("in", "a"), ("a", "b"), ("a", "+"), ("b", "+"), ("+", "c"), ("c", "out")}


def test_diagrams() -> None:
    outline = FlexModel(models.make("llama")).show(models.inputs("llama")).outline
    assert "model.layers.0" in outline.diagrams and "model.layers.1" not in outline.diagrams  # it is folded
    for name, svg in outline.diagrams.items():
        tree = ElementTree.fromstring(svg)
        texts = [t.text for t in tree.iter("{http://www.w3.org/2000/svg}text")]
        assert texts and tree.attrib["aria-label"], name
    texts = {t.text for t in ElementTree.fromstring(outline.diagrams["model"]).iter("{http://www.w3.org/2000/svg}text")}
    assert texts == {"in", "embed_tokens", "rotary_emb", "layers.0-1", "norm", "out"}


def test_labels_are_text() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("<script>alert(1)</script>", nn.Linear(2, 2))
            self.add_module('"x"', nn.Linear(2, 2))

        def forward(self, x: Tensor) -> Tensor:
            for module in self._modules.values():
                x = module(x)
            return x

    outline = FlexModel(nn.Sequential(Root())).show(torch.ones(1, 2)).outline
    svg = outline.diagrams["0"]
    assert "<script>" not in svg and ElementTree.fromstring(svg).attrib["aria-label"].count("<script>") == 2
