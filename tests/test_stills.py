"""Pictures that are drawn as SVG, as files."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import models
import pytest
import torch

from flex_model import FlexModel, stills
from flex_model.errors import FlexModelError
from flex_model.stills import save_svg

SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 200 100"><rect width="200" height="100" fill="red"/></svg>'
needs_browser = pytest.mark.skipif(not any(map(shutil.which, stills._BROWSERS)), reason="no Chromium or Chrome")


@needs_browser
def test_the_size_is_that_of_the_drawing(tmp_path: Path) -> None:
    data = save_svg(SVG, tmp_path / "a.png").read_bytes()
    assert data.startswith(b"\x89PNG") and struct.unpack(">II", data[16:24]) == (402, 202)  # twice, and a pixel more
    assert save_svg(SVG, tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    assert save_svg(SVG, tmp_path / "a.svg").read_text() == SVG


@needs_browser
def test_tables_and_trees(tmp_path: Path) -> None:
    fm = FlexModel(models.net())
    with torch.no_grad(), fm.capture("layers.*") as acts:
        fm(models.tokens())
    assert acts.show().save(tmp_path / "values.png").read_bytes().startswith(b"\x89PNG")
    assert fm.show(models.tokens()).save(tmp_path / "tree.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_fetched(tmp_path: Path) -> None:
    fm = FlexModel(models.net())
    assert "url(http" not in fm.show().save(tmp_path / "tree.svg").read_text()


def test_without_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FlexModelError, match="needs Chromium or Chrome"):
        save_svg(SVG, tmp_path / "a.png")
    with pytest.raises(FlexModelError, match="ends in"):
        save_svg(SVG, tmp_path / "a.gif")
