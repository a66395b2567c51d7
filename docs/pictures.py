"""Draws the pictures of ``docs/pictures.md``, and writes that page from the functions below.

    python docs/pictures.py --model HuggingFaceTB/SmolLM2-135M
    python docs/pictures.py norms attention --model FOLDER
    python docs/pictures.py --page

To add a picture, add a function with ``@picture``: its name is the file's, its docstring the text, its body the code
that the page shows. It is given what ``Setting`` has, by name.
"""

from __future__ import annotations

import argparse
import inspect
import shutil
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flex_model import FlexModel, edits
from flex_model.cli.show import sketch
from flex_model.cli.spread import Spread
from flex_model.lens import save_figure
from flex_model.show import Picture

FOLDER = Path(__file__).parent / "pictures"
PAGE = FOLDER.with_suffix(".md")
TEXT = "The Eiffel Tower is in Paris. The Colosseum is in Rome. The Eiffel Tower is in"
INTRODUCTION = """# Pictures

Drawn by `python docs/pictures.py --model HuggingFaceTB/SmolLM2-135M`, which also writes this page. `fm` is a
`FlexModel` of that model with eager attention, `decode` is `tokenizer.decode`, and `ids` are the tokens of
"{text}".
On many ranks the same code gives the same pictures, and the lowest rank writes them.

| drawn by | what | saved by, as |
|---|---|---|
| [rich](https://rich.readthedocs.io) | trees and tables, in colours | `save`: `.txt`, `.svg`, `.png`, `.pdf` |
| [igraph](https://python.igraph.org) | the nodes of a diagram, in layers | `save_diagram`: `.svg`, `.png`, `.pdf` |
| [jinja2](https://jinja.palletsprojects.com) | the page of a model | `save`: `.html` |
| [plotly](https://plotly.com/python) | figures to zoom into; charts of a run | `save_figure`: `.html` |
| [kaleido](https://github.com/plotly/Kaleido) | the same figures, still | `save_figure`: `.svg`, `.png`, `.pdf` |

Every `.png` and `.pdf` is drawn by a Chromium.
"""


@dataclass(frozen=True)
class Setting:
    fm: FlexModel
    ids: Tensor
    decode: Callable[[int], str]


@dataclass(frozen=True)
class Drawn:
    function: Callable[..., Any]
    by: str
    suffix: str

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}{self.suffix}"

    def draw(self, setting: Setting) -> None:
        asked = [p for p in inspect.signature(self.function).parameters if p != "path"]
        given = {name: getattr(setting, name) for name in asked}
        if self.function is not page:
            self.function(**given, path=self.path)
            return
        with tempfile.TemporaryDirectory() as folder:
            html = Path(folder) / "page.html"
            self.function(**given, path=html)
            screenshot(html, self.path)

    def section(self) -> str:
        """A heading, what it is, the code, the picture."""
        heading, _, text = inspect.cleandoc(self.function.__doc__ or "").partition("\n")
        source = inspect.getsource(self.function)
        body = source.split('"""\n', 1)[1] if source.count('"""') == 2 else source
        written = "page.html" if self.function is page else self.path.name
        code = textwrap.dedent(body).strip().replace("path)", f'"{written}")')
        shown = f"![{heading.rstrip('.')}](pictures/{self.path.name})"
        about = f"{text.strip()}\n\n" if text.strip() else ""
        return f"## {heading.rstrip('.')}\n{about}```python\n{code}\n```\n{shown}\n\nDrawn by {self.by}.\n"


PICTURES: list[Drawn] = []


def picture(by: str = "plotly and kaleido", suffix: str = ".svg") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        PICTURES.append(Drawn(function, by, suffix))
        return function

    return add


# -- the model ---------------------------------------------------------------------------------------------------
@picture(by="rich")
def tree(fm: FlexModel, ids: Tensor, path: Path) -> None:
    """A model as a tree

    `print(fm.show(ids))` gives it as text, `flex-model show` without weights and for ranks that need not exist."""
    with fm.edit("model.layers.5.mlp.act_fn", edits.zero([3])):
        fm.show(ids).save(path)


@picture(by="igraph")
def block(fm: FlexModel, ids: Tensor, path: Path) -> None:
    """How values flow in a block"""
    fm.show(ids).save_diagram("model.layers.0", path)


@picture(by="the page itself: HTML, CSS and JavaScript of this library in one file, here in a Chromium", suffix=".png")
def page(fm: FlexModel, path: Path) -> None:
    """The page of a model

    Here of one that runs nowhere, as `flex-model show --model FOLDER --fsdp 2 --tp 3 --out page.html` writes it. In a
    notebook `fm.show(ids)` is this page."""
    picture = Picture(sketch(fm.config, Spread(fsdp=2, tp=3)))
    picture.save(path)


def screenshot(html: Path, path: Path) -> None:
    """The page with a block chosen."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1300, "height": 900})
        tab.goto(html.as_uri())
        tab.fill("input[type=search]", "model.layers.0.mlp")
        tab.keyboard.press("Enter")
        tab.wait_for_timeout(500)
        tab.screenshot(path=path)
        browser.close()


# -- captured values ---------------------------------------------------------------------------------------------
@picture(by="rich")
def statistics(fm: FlexModel, ids: Tensor, path: Path) -> None:
    """Statistics of captured values

    `print(acts.show())` gives it as text; `rich.print` in colours; a notebook as a table."""
    with torch.no_grad(), fm.capture(fm.at("resid_post", range(0, 30, 3)), fm.at("mlp_post", 3), "lm_head") as acts:
        fm(ids)
    acts.show().save(path)


@picture()
def norms(fm: FlexModel, ids: Tensor, decode: Callable[[int], str], path: Path) -> None:
    """Norms of the residual stream, layer by position

    The logarithm of the L2 norm: from layer 11 to 27 that of the first token is a hundred times that of others."""
    with torch.no_grad(), fm.capture(fm.at("resid_post")) as acts:
        fm(ids)

    def log_norm(x: Tensor) -> Tensor:
        return x.norm(dim=-1).log10()

    figure = acts.show().heatmap(log_norm, tokens=ids, decode=decode)
    save_figure(figure, path)


@picture()
def attention(fm: FlexModel, ids: Tensor, decode: Callable[[int], str], path: Path) -> None:
    """Attention patterns of a layer, a panel a head"""
    with torch.no_grad(), fm.capture(fm.at("pattern", 5)) as acts:
        fm(ids)
    figure = acts.show().attention(layer=5, tokens=ids, decode=decode)
    save_figure(figure, path)


@picture()
def histogram(fm: FlexModel, ids: Tensor, path: Path) -> None:
    """Histograms of the residual stream, one outline a layer"""
    with torch.no_grad(), fm.capture(fm.at("resid_post", range(0, 30, 3))) as acts:
        fm(ids)
    save_figure(acts.show().histogram(log=True), path)


@picture()
def histograms(fm: FlexModel, ids: Tensor, path: Path) -> None:
    """The same of several kinds of sites, in panels"""
    sites = [fm.at(component, 12) for component in ("resid_post", "attn_out", "mlp_out", "mlp_post", "q", "k")]
    with torch.no_grad(), fm.capture(*sites) as acts:
        fm(ids)
    save_figure(acts.show().histogram(together=False, log=True), path)


@picture(by="rich")
def against(fm: FlexModel, ids: Tensor, path: Path) -> None:
    """Two captures beside one another

    What does an MLP of zeros in layer 20 change? A star is on values that differ by more than the dtype's tolerance."""
    with torch.no_grad():
        with fm.capture(fm.at("resid_post", range(16, 30, 2))) as plain:
            fm(ids)
        with fm.edit(fm.at("mlp_out", 20), edits.zero()), fm.capture(fm.at("resid_post", range(16, 30, 2))) as acts:
            fm(ids)
    acts.show(against=plain).save(path)


@picture()
def differences(fm: FlexModel, ids: Tensor, decode: Callable[[int], str], path: Path) -> None:
    """Where two captures differ, layer by position

    An edit at one token, and where it gets to: the norm of the difference, relative to the larger norm."""
    with torch.no_grad():
        with fm.capture(fm.at("resid_post")) as plain:
            fm(ids)
        with fm.edit(fm.at("mlp_out", 8), edits.zero(positions=[5])), fm.capture(fm.at("resid_post")) as acts:
            fm(ids)
    figure = acts.show(against=plain).heatmap("relative", tokens=ids, decode=decode)
    save_figure(figure, path)


# -- the page ----------------------------------------------------------------------------------------------------
def text() -> str:
    """What ``docs/pictures.md`` must be."""
    return "\n".join([INTRODUCTION.format(text=TEXT), *(drawn.section() for drawn in PICTURES)])


def load(model: str) -> Setting:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    return Setting(FlexModel(plain), ids, tokenizer.decode)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures of docs/pictures.md.")
    parser.add_argument("names", nargs="*", help="which; all without")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="a name on the Hub, or a folder")
    parser.add_argument("--page", action="store_true", help="only write the page")
    given = parser.parse_args()
    unknown = set(given.names) - {drawn.name for drawn in PICTURES}
    if unknown:
        parser.error(f"no picture is called {', '.join(sorted(unknown))}")
    FOLDER.mkdir(exist_ok=True)
    PAGE.write_text(text(), encoding="utf-8")
    if given.page:
        return
    setting = load(given.model)
    for drawn in PICTURES:
        if not given.names or drawn.name in given.names:
            drawn.draw(setting)
            print(f"{drawn.path.name}: {drawn.path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
