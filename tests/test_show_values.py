"""``acts.show``: the numbers are those of plain torch on the captured values, under every engine; labels are text."""

from __future__ import annotations

import html
import importlib.util
import re
import shutil
import sys
from math import isnan
from pathlib import Path
from typing import Any

import engines
import models
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shapes import WithTable
from torch import Tensor, nn
from worlds import run_world

from flex_model import FlexModel, FlexModelError, edits
from flex_model.check.diff import diff
from flex_model.core.captured import Captured
from flex_model.errors import ComponentError, DeliveryError, NameNotFoundError
from flex_model.lens import logit_lens, save_figure
from flex_model.result import as_label
from flex_model.routing.assembly import Parts
from flex_model.show.values import DifferencePicture, ValuesPicture, histogram, summary
from flex_model.show.values.histogram import Histogram
from flex_model.show.values.summary import Summary, summarise

NASTY = "<b>bold</b> & <script>alert(1)</script> $x$"
NUMBERS = ("mean", "std", "norm", "low", "high", "zeros", "nonfinite")


def captured(**values: Any) -> Captured:
    """A capture of these values; a list is of several calls."""
    acts = Captured(list(values))
    for name, value in values.items():
        for one in value if isinstance(value, list) else [value]:
            acts._values.put(name, one)
    return acts


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_torch(value: Tensor) -> dict[str, float]:
    """The oracle of one value, in a few lines of torch."""
    x = value.double() if value.dim() else value.double().unsqueeze(0)
    finite = x[x.isfinite()]
    rows = torch.where(x.isfinite(), x, 0.0).norm(dim=-1)
    return {
        "mean": float(finite.mean()),
        "std": float(finite.std(correction=0)),
        "norm": float(rows.mean()),
        "low": float(finite.min()),
        "high": float(finite.max()),
        "zeros": float((x == 0).double().mean()),
        "nonfinite": int((~x.isfinite()).sum()),
    }


def same(found: Summary, want: dict[str, float], tolerance: float = 1e-9) -> None:
    for name, number in want.items():
        assert getattr(found, name) == pytest.approx(number, rel=tolerance, abs=1e-12), name


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "_CHUNK", 7)


# -- statistics ------------------------------------------------------------------------------------------------
VALUES = {
    "float32": normal(4, 6, 8),
    "float64": normal(5, 3).double(),
    "bfloat16": normal(4, 6, 8).bfloat16(),
    "float16": normal(3, 9).half(),
    "float8_e4m3fn": normal(4, 8).to(torch.float8_e4m3fn),
    "int64": torch.randint(-50, 50, (4, 6), generator=torch.Generator().manual_seed(0)),
    "uint8": torch.arange(20, dtype=torch.uint8).view(4, 5),
    "bool": normal(4, 6) > 0.5,
}
SHAPES = {
    "scalar": torch.tensor(3.0),
    "vector": normal(40),
    "column": normal(40, 1),
    "five dims": normal(2, 3, 2, 2, 5),
    "not contiguous": normal(8, 6, 4).permute(2, 0, 1),
    "expanded": normal(1, 6).expand(9, 6),
    "far from 0": normal(30, 30).double() + 1e8,
    "nan and inf": torch.where(
        normal(6, 6) > 1, torch.nan, torch.where(normal(6, 6, seed=1) > 1, torch.inf, normal(6, 6))
    ),
}


@pytest.mark.parametrize("name", [*VALUES, *SHAPES])
@pytest.mark.parametrize("pieces", [False, True])
def test_statistics_by_hand(name: str, pieces: bool, request: pytest.FixtureRequest) -> None:
    if pieces:
        request.getfixturevalue("small_pieces")
    value = {**VALUES, **SHAPES}[name]
    found = summarise(value)
    same(found, of_torch(value))
    assert found.shape == tuple(value.shape) and f"torch.{found.dtype}" == str(value.dtype)
    assert int(found.histogram.counts.sum()) == value.numel() - found.nonfinite


def test_a_complex_value_is_its_real_and_imaginary_parts() -> None:
    value = torch.complex(normal(4, 6), normal(4, 6, seed=1))
    same(summarise(value), of_torch(torch.cat([value.real, value.imag], -1)))


def test_without_elements_there_are_no_numbers() -> None:
    for value in (torch.zeros(0, 4), torch.full((2, 2), torch.nan)):
        found = summarise(value)
        assert isnan(found.mean) and isnan(found.low) and found.nonfinite == value.numel()
        assert str(captured(x=value).show()).splitlines()[2].split()[-7:].count("-") >= 4


def test_no_whole_copy_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "_CHUNK", 1000)
    sizes, double = [], Tensor.double

    def noted(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return double(x)

    monkeypatch.setattr(Tensor, "double", noted)
    for shape in ((40, 50, 30), (60_000,), (2, 30_000), (1, 1, 100, 600)):
        sizes.clear()
        summarise(torch.ones(shape))
        assert max(sizes) <= 1000 and sum(sizes) == 60_000


# -- histograms ------------------------------------------------------------------------------------------------
FLOATS = st.floats(-1e6, 1e6) | st.floats(-1e-6, 1e-6) | st.just(0.0)


@given(st.lists(FLOATS, min_size=1, max_size=60), st.integers(1, 7))
@settings(max_examples=100, deadline=None)
def test_counts_are_exact_in_any_pieces(values: list[float], size: int) -> None:
    x = torch.tensor([v if abs(v) > 1e-200 else 0.0 for v in values], dtype=torch.double)
    pieces, whole = Histogram(), Histogram()
    for piece in x.split(size):
        pieces.add(piece)
    whole.add(x)
    assert pieces.edges.tolist() == whole.edges.tolist() and pieces.counts.tolist() == whole.counts.tolist()
    for found in (whole, whole.coarse(100), whole.coarse(8), whole.coarse(2)):
        inside = (x[:, None] >= found.edges[:-1]) & (x[:, None] < found.edges[1:])
        assert inside.sum(0).tolist() == found.counts.tolist()
        assert len(found.counts) <= histogram._MOST and found.counts[0] and found.counts[-1]


def test_extremes_have_bins() -> None:
    found = Histogram()
    for piece in ([0.0], [5e-324], [-1.7e308], [1.7e308], [1.0, 2.0]):
        found.add(torch.tensor(piece, dtype=torch.double))
    assert int(found.counts.sum()) == 6 and float(found.edges[0]) <= -1.7e308


def test_the_middle_of_a_histogram() -> None:
    found = Histogram()
    found.add(torch.cat([torch.linspace(-1, 1, 998).double(), torch.tensor([-1e3, 1e3]).double()]))
    middle = found.within(0.99)
    assert int(middle.counts.sum()) >= 990 and float(middle.edges[0]) > -1.2 and float(middle.edges[-1]) < 1.2
    assert found.within(1.0).counts.tolist() == found.counts.tolist()
    assert found.spark(8)[0] == "▁" and found.spark(8).strip("▁█ ") == ""


# -- the table -------------------------------------------------------------------------------------------------
def test_every_dtype_in_one_table() -> None:
    picture = captured(**VALUES).show()
    lines = str(picture).splitlines()
    assert lines[0] == f"{len(VALUES)} values" and lines[1].split()[-1] == "histogram"
    for line, (name, value) in zip(lines[2:], VALUES.items(), strict=True):
        assert line.split()[0] == name and str(list(value.shape)) in line and f" {name} " in f" {line}"
        assert f"{of_torch(value)['std']:.4g}" in line


def test_calls_and_parts() -> None:
    parts = Parts((normal(2, 3, 4), normal(2, 5, 4)), ({"dp": 0}, {"dp": 1}))
    picture = captured(a=[normal(2, 3), normal(2, 4)], b=parts).show()
    assert list(picture.summaries) == ["a", "a#1", "b@0", "b@1"]
    same(picture.summaries["b@1"], of_torch(parts[1]))


def test_a_pattern_chooses() -> None:
    acts = captured(**{"layers.0.mlp": normal(2, 3), "layers.1.mlp": normal(2, 3), "head": normal(2, 3)})
    assert list(acts.show("layers.*.mlp").summaries) == ["layers.0.mlp", "layers.1.mlp"]
    with pytest.raises(NameNotFoundError, match="matches no captured name"):
        acts.show("layers.*.attn")


def test_gradients() -> None:
    fm = FlexModel(models.net())
    with fm.capture("layers.*", grad=True) as acts:
        fm(models.tokens()).pow(2).mean().backward()
    picture = acts.show(grad=True)
    assert str(picture).startswith("2 gradients")
    same(picture.summaries["layers.0"], of_torch(acts.grad("layers.0")))  # type: ignore[arg-type]


def test_what_has_not_arrived_says_so() -> None:
    fm = FlexModel(models.net())
    with fm.capture("head", "layers.*") as acts:
        text = str(acts.show())
    assert text.startswith("0 values") and text.count("has not arrived") == 3


def test_outputs_with_several_tensors_have_a_row_each() -> None:
    fm = FlexModel(models.make("llama"))
    with torch.no_grad(), fm.capture("model.layers.*.self_attn", unpack_idx="all") as acts:
        fm(**models.inputs("llama"))
    assert list(acts.show().summaries) == [
        f"model.layers.{layer}.self_attn:forward:{i}" for layer in (0, 1) for i in (0, 1)
    ]


def test_the_table_is_saved(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    picture = captured(a=normal(2, 3)).show()
    assert picture.save(tmp_path / "a.txt").read_text(encoding="utf-8") == f"{picture}\n"
    assert "<svg" in picture.save(tmp_path / "a.svg").read_text(encoding="utf-8")
    assert picture.save(str(tmp_path / "a.html")).read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(FlexModelError, match=r"ends in \.txt, \.html, \.svg, \.png, \.pdf, got 'a\.jpeg'"):
        picture.save(tmp_path / "a.jpeg")


def test_colours_say_the_same() -> None:
    console = pytest.importorskip("rich.console").Console(width=200, color_system=None)
    acts = captured(a=normal(2, 3), b=torch.tensor([torch.nan, 1.0]))
    acts.refused["c"] = FlexModelError("[red]nobody[/red] knows")
    for picture in (acts.show(), acts.show(against=acts)):
        with console.capture() as out:
            console.print(picture)
        assert [line.split() for line in out.get().splitlines()] == [line.split() for line in str(picture).splitlines()]


# -- labels are text -------------------------------------------------------------------------------------------
def test_names_with_html_are_text() -> None:
    acts = captured(**{NASTY: normal(2, 3, 4)})
    acts.refused["<i>gone</i>"] = FlexModelError("<u>nobody</u> knows")
    for picture in (acts.show(), acts.show(against=acts)):
        for page in (picture._repr_html_(), picture.sheet.page()):
            assert html.escape(NASTY) in page and "&lt;u&gt;nobody&lt;/u&gt; knows" in page
            assert not re.search("<(b|i|u)>(bold|gone|nobody)|<script", page)


def test_labels_of_figures_are_text() -> None:
    pytest.importorskip("plotly")
    label = as_label(NASTY)
    assert html.unescape(label) == NASTY and not set(label) & set("<>$")
    picture = captured(**{f"layers.0.{NASTY}": normal(1, 2, 4), "other": normal(1, 2, 4)}).show()
    marks = picture.heatmap(tokens=[[NASTY, "a\nb"]]).layout
    assert list(marks.xaxis.ticktext) == [f"0 {label}", "1 a\\nb"]
    assert marks.yaxis.ticktext[0] == f"layers.0.{label}"
    assert picture.histogram().data[0].name == f"layers.0.{label}"
    assert picture.histogram(together=False).layout.annotations[0].text == f"layers.0.{label}"


def test_labels_of_a_lens_are_text() -> None:
    pytest.importorskip("plotly")
    figure = logit_lens(FlexModel(models.make("llama")), **models.inputs("llama")).plot(decode=lambda i: "</s>")
    assert figure.layout.xaxis.ticktext[0] == "0 &lt;/s&gt;" and figure.data[0].text[0][0] == "&lt;/s&gt;"


# -- heatmaps --------------------------------------------------------------------------------------------------
def layered() -> tuple[Captured, Tensor]:
    value = normal(3, 4, 5, 8)
    return captured(**{f"model.layers.{i}": v for i, v in enumerate(value)}), value.double()


def cells(figure: Any, trace: int = 0) -> Tensor:
    return torch.tensor([[torch.nan if x is None else x for x in row] for row in figure.data[trace].z])


@pytest.mark.parametrize("what", ["norm", "mean", "std", "max"])
def test_heatmaps_by_hand(what: str) -> None:
    pytest.importorskip("plotly")
    acts, value = layered()
    want = {
        "norm": value.pow(2).sum(-1).sqrt(),
        "mean": value.mean(-1),
        "std": value.std(-1, correction=0),
        "max": value.abs().max(-1).values,
    }[what]
    figure = acts.show().heatmap(what, row=2)
    torch.testing.assert_close(cells(figure).double(), want[:, 2], atol=1e-6, rtol=1e-6)
    assert list(figure.layout.yaxis.ticktext) == ["0", "1", "2"] and figure.layout.yaxis.title.text == "layer"
    assert (figure.data[0].zmid == 0) == (what == "mean")  # of both signs: white is 0


def test_heatmaps_of_a_function() -> None:
    pytest.importorskip("plotly")
    acts, value = layered()
    figure = acts.show().heatmap(lambda x: x[..., 0], names="model.layers.1", row=-1)
    torch.testing.assert_close(cells(figure).double(), value[1:2, 3, :, 0])
    with pytest.raises(FlexModelError, match=r"what= gave \(5, 8\) .* expected a number a position, \(5,\)"):
        acts.show().heatmap(lambda x: x)
    blank = acts.show().heatmap(lambda x: x[..., 0] / 0)
    assert not cells(blank).isfinite().any()


def test_tokens_are_labels() -> None:
    pytest.importorskip("plotly")
    picture = layered()[0].show()
    ids = torch.arange(20).view(4, 5)
    for tokens, decode in (
        (ids, lambda i: f"t{i}"),
        (ids[1], lambda i: f"t{i}"),
        ([f"t{i}" for i in range(5, 10)], str),
    ):
        figure = picture.heatmap(row=1, tokens=tokens, decode=decode)
        assert list(figure.layout.xaxis.ticktext) == [f"{i} t{i + 5}" for i in range(5)]
    with pytest.raises(FlexModelError, match="expected those of 4 rows, found 2"):
        picture.heatmap(tokens=ids[:2])
    with pytest.raises(FlexModelError, match="expected 5 of row 0, found 4"):
        picture.heatmap(tokens=ids[:, :4])


def test_long_rows_have_some_labels() -> None:
    pytest.importorskip("plotly")
    figure = captured(a=normal(1, 500, 2)).show().heatmap(tokens=torch.arange(500))
    assert figure.layout.xaxis.ticktext[1] == "8 8" and len(figure.layout.xaxis.ticktext) == 63


def test_refused_sites_are_blank() -> None:
    pytest.importorskip("plotly")
    acts, _ = layered()
    acts._keys.append("model.layers.3")
    acts.refused["model.layers.3"] = FlexModelError("nobody knows")
    figure = acts.show().heatmap()
    assert figure.layout.yaxis.ticktext[3] == "3 (refused)"
    assert cells(figure)[3].isnan().all() and cells(figure)[:3].isfinite().all()
    assert str(acts.show()).splitlines()[-1] == "model.layers.3: nobody knows"


def test_a_row_of_parts() -> None:
    pytest.importorskip("plotly")
    parts = Parts((normal(2, 3, 4), normal(2, 5, 4)), ({"dp": 0}, {"dp": 1}))
    found = cells(captured(a=parts).show().heatmap(row=3))
    torch.testing.assert_close(found, parts[1][1:].norm(dim=-1))


def test_bad_heatmaps() -> None:
    acts, _ = layered()
    picture = acts.show()
    with pytest.raises(FlexModelError, match="what='kurtosis' is unknown; expected 'norm', 'mean', 'std', 'max' or"):
        picture.heatmap("kurtosis")
    with pytest.raises(FlexModelError, match="row=4: expected one of the 4 rows"):
        picture.heatmap(row=4)
    with pytest.raises(NameNotFoundError, match="matches no captured name"):
        picture.heatmap(names="head")
    with pytest.raises(NameNotFoundError, match=r"expected a value \(batch, .+\), found none among 'a'"):
        captured(a=normal(3, 4)).show().heatmap()
    with pytest.raises(FlexModelError, match=r"found \(2, 3\) of 'a' and \(1, 3\) of 'b'"):
        captured(a=normal(2, 3, 4), b=normal(1, 3, 4)).show().heatmap()
    calls = captured(a=[normal(2, 3, 4), normal(2, 3, 4, seed=1)]).show()
    with pytest.raises(DeliveryError, match="has 2 calls; take one with call=0"):
        calls.heatmap()
    with pytest.raises(FlexModelError, match="call=2: expected one of the 2 calls"):
        calls.heatmap(call=2)
    if importlib.util.find_spec("plotly"):
        torch.testing.assert_close(cells(calls.heatmap(call=-1)), normal(2, 3, 4, seed=1)[:1].norm(dim=-1))


# -- attention -------------------------------------------------------------------------------------------------
def test_attention_of_a_llama() -> None:
    pytest.importorskip("plotly")
    model, batch = models.make("llama"), models.inputs("llama")
    with torch.no_grad():
        want = model(**batch, output_attentions=True).attentions
        fm = FlexModel(model)
        with fm.capture(fm.at("pattern")) as acts:
            fm(**batch)
        with fm.capture(fm.at("pattern", 1, head=[0, 2]), fm.at("pattern", 1, head=3)) as few:
            fm(**batch)
        with fm.capture("model.layers.*.self_attn", unpack_idx=1) as plain:
            fm(**batch)
    for picture in (acts.show(), plain.show()):
        figure = picture.attention(row=2, tokens=batch["input_ids"], decode=lambda i: f"<{i}>")
        titles = [note.text for note in figure.layout.annotations]
        assert titles[:8] == [f"layer {layer}, head {head}" for layer in (0, 1) for head in range(4)]
        for i in range(8):
            torch.testing.assert_close(cells(figure, i), want[i // 4][2, i % 4])
        assert figure.layout.xaxis.ticktext[0] == f"0 &lt;{int(batch['input_ids'][2, 0])}&gt;"
    figure = few.show().attention(heads=[2, 3])
    assert [note.text for note in figure.layout.annotations][:2] == ["layer 1, head 2", "layer 1, head 3"]
    torch.testing.assert_close(cells(figure, 1), want[1][0, 3])
    assert len(acts.show().attention(layer=-1, heads=0).data) == 1
    with pytest.raises(FlexModelError, match="layer 5 was not captured; expected some of 0, 1"):
        acts.show().attention(layer=5)
    with pytest.raises(FlexModelError, match="head 1 was not captured; expected some of 0, 2, 3"):
        few.show().attention(heads=1)


def test_attention_that_is_not_there() -> None:
    with pytest.raises(ComponentError, match="no attention pattern was captured"):
        captured(a=normal(2, 3, 4)).show().attention()
    with pytest.raises(FlexModelError, match="at most 64 heads in a picture, found 100"):
        captured(**{"@pattern.0": normal(1, 100, 2, 2)}).show().attention()


# -- figures of histograms -------------------------------------------------------------------------------------
def test_densities_sum_to_the_share_that_is_shown() -> None:
    pytest.importorskip("plotly")
    picture = captured(**{f"layers.{i}": normal(40, 50, seed=i) * (i + 1) for i in range(3)}).show()
    for trace in picture.histogram(within=1).data:
        x, y = torch.tensor(trace.x), torch.tensor(trace.y)
        assert float(((x[1:] - x[:-1]) * y[:-1]).sum()) == pytest.approx(1, rel=1e-5)
    assert [t.name for t in picture.histogram().data] == ["0", "1", "2"]
    bars = picture.histogram(together=False, within=0.9, log=True)
    assert len(bars.data) == 3 and bars.layout.yaxis.type == "log"
    for bar in bars.data:
        assert 0.9 <= sum(bar.y) * bar.width <= 1
    with pytest.raises(FlexModelError, match=r"within=2: expected a share"):
        picture.histogram(within=2)
    with pytest.raises(DeliveryError, match="no value has a finite element"):
        captured(a=torch.tensor([torch.nan])).show().histogram()


# -- differences -----------------------------------------------------------------------------------------------
def test_differences_by_hand(small_pieces: None) -> None:
    a, b = normal(4, 6, 8), normal(4, 6, 8, seed=1)
    picture = captured(x=a, y=a, z=a).show(against=captured(x=b, y=a + 0, z=a + 1e-7))
    x, y = a.double(), b.double()
    found = picture.differences["x"]
    assert found.largest == pytest.approx(float((x - y).abs().max()))
    assert found.mean == pytest.approx(float((x - y).abs().mean()))
    assert found.relative == pytest.approx(float((x - y).norm() / max(x.norm(), y.norm())))
    assert found.cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), 0)))
    assert str(picture).splitlines()[0] == "1 of 3 values differ"
    assert [row.alert for row in picture.sheet.rows] == [True, False, False]


def test_differences_agree_with_diff() -> None:
    """``check.diff`` estimates the same number from projections, and uses the same tolerances."""
    a = captured(x=normal(40, 64), y=normal(40, 64).bfloat16())
    b = captured(x=normal(40, 64, seed=1), y=normal(40, 64).bfloat16() * 1.01)
    picture, estimate = a.show(against=b), diff(a, b)
    for row in estimate.rows:
        found = picture.differences[row.place.name]
        assert found.relative == pytest.approx(row.error, rel=0.5)
        alert = next(r.alert for r in picture.sheet.rows if r.cells[0] == row.place.name)
        assert alert != row.same


def test_what_is_not_finite_is_unlike() -> None:
    a = torch.tensor([torch.nan, torch.inf, 1.0, 2.0, torch.nan])
    b = torch.tensor([torch.nan, -torch.inf, 1.0, torch.nan, 3.0])
    found = captured(x=a).show(against=captured(x=b)).differences["x"]
    assert (found.unlike, found.largest) == (3, 0.0)
    alike = captured(x=a).show(against=captured(x=a))
    assert alike.differences["x"].unlike == 0 and not alike.sheet.rows[0].alert


def test_what_cannot_be_compared_says_so() -> None:
    picture = captured(a=normal(2, 3), b=normal(2)).show(against=captured(a=normal(2, 4), c=normal(2)))
    notes = dict(picture.sheet.notes)
    assert notes["a"] == "the shapes are [2, 3] and [2, 4]"
    assert "only in the first" in notes["b"] and "only in the second" in notes["c"]
    with pytest.raises(DeliveryError, match="no value in common"):
        picture.heatmap()


def test_heatmaps_of_differences() -> None:
    pytest.importorskip("plotly")
    fm = FlexModel(models.make("llama"))
    batch, place = models.inputs("llama"), fm.at("resid_post")
    with torch.no_grad():
        with fm.capture(place) as plain:
            fm(**batch)
        with fm.edit(fm.at("mlp_out", 1), edits.zero(positions=[3])), fm.capture(place) as acts:
            fm(**batch)
    picture = acts.show(against=plain)
    assert isinstance(picture, DifferencePicture) and isinstance(acts.show(), ValuesPicture)
    found = cells(picture.heatmap(row=1))
    want = [(acts[k][1] - plain[k][1]).norm(dim=-1) for k in place.keys]  # type: ignore[index]
    torch.testing.assert_close(found, torch.stack(want), atol=1e-7, rtol=1e-5)
    relative = cells(picture.heatmap("relative", row=1))
    assert (relative > 0).nonzero().tolist() == [[1, 3]]


# -- engines ---------------------------------------------------------------------------------------------------
def _numbers(fm: FlexModel, batch: Tensor) -> dict[str, Any]:
    with torch.no_grad():
        with fm.capture("layers.*", "layers.*.mlp.act", "head") as acts:
            fm(batch)
        with fm.edit("layers.0.mlp", edits.scale(2.0)), fm.capture("layers.*", "head") as other:
            fm(batch)
    summaries = acts.show().summaries
    apart = other.show(against=acts)
    return {
        "statistics": {n: [getattr(s, k) for k in NUMBERS] for n, s in summaries.items()},
        "shapes": {n: s.shape for n, s in summaries.items()},
        "differences": {n: [d.largest, d.mean, d.relative, d.cosine] for n, d in apart.differences.items()},
        "cells": [cells(p.heatmap(names="layers.*", row=3)).tolist() for p in (acts.show(), apart)],
    }


def _spread(engine: str) -> dict[str, Any]:
    placed = engines.place(engine, models.net())
    return _numbers(FlexModel(placed.model), placed.mine(models.tokens()))


def flat(numbers: Any) -> list[float]:
    if isinstance(numbers, (list, dict)):
        return [x for one in (numbers.values() if isinstance(numbers, dict) else numbers) for x in flat(one)]
    return [numbers]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "tp", "sp"])
def test_the_same_under_every_engine(engine: str) -> None:
    pytest.importorskip("plotly")
    want = _numbers(FlexModel(models.net()), models.tokens())
    for found in run_world(2, _spread, engine):
        assert found["shapes"] == want["shapes"]
        for part in ("statistics", "differences", "cells"):
            assert flat(found[part]) == pytest.approx(flat(want[part]), rel=1e-4, abs=1e-6), part


def _main(folder: Path) -> list[Any]:
    placed = engines.place("ddp", models.net())
    fm = FlexModel(placed.model)
    with torch.no_grad(), fm.capture("layers.*", deliver="main") as acts:
        fm(placed.mine(models.tokens()))
    picture, raised = acts.show(), ""
    try:
        picture.heatmap()
    except DeliveryError as error:
        raised = error.message
    path = picture.save(folder / f"{dist.get_rank()}.txt")
    return [str(picture), raised, path.exists(), str(acts.show(against=acts))]


def test_where_nothing_is_delivered_it_says_so(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    here, away = run_world(2, _main, tmp_path)
    assert here[0].startswith("2 values") and here[1:3] == ["", True]
    why = "deliver='main' sent it to rank 0, and this is rank 1; pass deliver='all'."
    assert away[:3] == [f"no values are here: {why}", f"no values are here: {why}", False]
    assert away[3] == f"nothing is here to compare: {why}"


def _local() -> list[str]:
    placed = engines.place("tp", models.net())
    fm = FlexModel(placed.model)
    with torch.no_grad(), fm.capture("layers.0.mlp.act", "layers.0.mlp", deliver="local") as acts:
        fm(placed.mine(models.tokens()))
    return str(acts.show()).splitlines()


def test_a_shard_is_not_shown_as_the_whole() -> None:
    for lines in run_world(2, _local):
        assert lines[0] == "1 value" and lines[2].startswith("layers.0.mlp ")
        assert lines[3].startswith("layers.0.mlp.act: the value lies in shards (S(2)); capture with deliver='all'")


def _refused() -> str:
    torch.manual_seed(0)
    fm = FlexModel(nn.parallel.DistributedDataParallel(WithTable()))
    with torch.no_grad(), fm.capture("table", "center") as acts:
        fm(normal(2, 6, 8, seed=dist.get_rank()))
    return str(acts.show())


def test_refused_sites_are_named() -> None:
    for text in run_world(2, _refused):
        assert re.search(r"^1 value\nname .*\ntable .*\ncenter: .*layout=", text)


# -- pictures in files -----------------------------------------------------------------------------------------
NO_CHROMIUM = not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")))


@pytest.mark.skipif(NO_CHROMIUM, reason="no Chromium to draw static pictures")
def test_pictures_in_files(tmp_path: Path) -> None:
    pytest.importorskip("kaleido")
    acts, _ = layered()
    tokens = ["<b>bold</b>", "$x$", "&amp;", "a\nb", "</s>"]
    svg = save_figure(acts.show().heatmap(tokens=tokens), tmp_path / "heat.svg").read_text(encoding="utf-8")
    shown = [html.unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]
    for i, token in enumerate(tokens):
        assert f"{i} {token}".replace("\n", "\\n") in shown
    attention = captured(**{"@pattern.0": torch.softmax(normal(1, 5, 6, 6), -1)}).show().attention()
    png = save_figure(attention, tmp_path / "attention.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") == 2 * attention.layout.width


def test_pages_need_no_chromium(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    acts, _ = layered()
    for i, figure in enumerate((acts.show().heatmap(), acts.show().histogram(), acts.show(against=acts).heatmap())):
        assert "plotly" in save_figure(figure, tmp_path / f"{i}.html").read_text(encoding="utf-8")


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = captured(**{"@pattern.0": normal(1, 2, 3, 3)}, a=normal(1, 3, 4)).show()
    for module in ("plotly", "plotly.graph_objects", "rich.console"):
        monkeypatch.setitem(sys.modules, module, None)
    drawn = (picture.heatmap, picture.attention, picture.histogram, lambda: picture.histogram(together=False))
    for draw in drawn:
        with pytest.raises(FlexModelError, match=r"pictures need plotly; install flex-model\[plot\]"):
            draw()
    with pytest.raises(FlexModelError, match=r"needs rich; install flex-model\[cli\]"):
        picture.save(tmp_path / "a.svg")
    assert picture.save(tmp_path / "a.html").exists() and "2 values" in str(picture)


# -- the page of pictures --------------------------------------------------------------------------------------
def test_the_page_of_pictures_is_up_to_date() -> None:
    path = Path(__file__).parent.parent / "docs" / "pictures.py"
    spec = importlib.util.spec_from_file_location("docs_pictures", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.text(), "run python docs/pictures.py --page"
    assert {drawn.path.name for drawn in module.PICTURES} == {path.name for path in module.FOLDER.iterdir()}
