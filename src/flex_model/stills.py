"""``save_svg``: a picture that is drawn as SVG, as a file for papers and slides."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from flex_model.errors import FlexModelError

__all__ = ["STILLS", "save_svg"]

STILLS = (".svg", ".png", ".pdf")
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_SECONDS = 60


def save_svg(svg: str, path: str | Path) -> Path:
    """Write it as ``.svg``, or drawn by a Chromium as ``.png`` or ``.pdf``. Raises FlexModelError without one."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".svg":
        path.write_text(svg, encoding="utf-8")
        return path
    if suffix not in STILLS:
        raise FlexModelError(
            f"expected a path that ends in {', '.join(STILLS)}, got {path.name!r}.", page="bad-argument"
        )
    browser = next((found for name in _BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise FlexModelError(
            f"a {suffix} needs Chromium or Chrome; install it (apt-get install chromium), or save as .svg.",
            page="not-installed",
        )
    _draw(browser, svg, path.resolve(), suffix)
    return path


def _draw(browser: str, svg: str, path: Path, suffix: str) -> None:
    box = re.search(r'viewBox="([^"]+)"', svg)
    assert box is not None, "a picture of ours says its size"
    wide, high = (int(float(number)) + 1 for number in box[1].split()[2:])
    style = f"@page{{size:{wide}px {high}px;margin:0}}body{{margin:0;color:#1c2330}}svg{{display:block;width:{wide}px}}"
    with tempfile.TemporaryDirectory(prefix="picture-") as folder:
        page = Path(folder) / "page.html"
        page.write_text(f"<!doctype html><meta charset=utf-8><style>{style}</style>{svg}", encoding="utf-8")
        made = Path(folder) / f"made{suffix}"
        how = [f"--screenshot={made}", "--force-device-scale-factor=2", f"--window-size={wide},{high}"]
        if suffix == ".pdf":
            how = [f"--print-to-pdf={made}", "--no-pdf-header-footer"]
        root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # it refuses root otherwise
        command = [browser, "--headless", "--disable-gpu", "--hide-scrollbars", *root, *how, page.as_uri()]
        command.insert(1, f"--user-data-dir={folder}/profile")
        try:
            subprocess.run(command, capture_output=True, timeout=_SECONDS, check=True)
            path.write_bytes(made.read_bytes())
        except (OSError, subprocess.SubprocessError) as error:
            raise FlexModelError(
                f"{browser} could not draw {path.name} ({type(error).__name__}: {error}); save as .svg.",
                page="not-installed",
            ) from error
