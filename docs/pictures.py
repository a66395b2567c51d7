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
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flex_model import FlexModel, edits
from flex_model.lens import save_figure

FOLDER = Path(__file__).parent / "pictures"
PAGE = FOLDER.with_suffix(".md")
TEXT = "The Eiffel Tower is in Paris. The Colosseum is in Rome. The Eiffel Tower is in"
INTRODUCTION = """# Pictures

Drawn by `python docs/pictures.py --model HuggingFaceTB/SmolLM2-135M`, which also writes this page. `fm` is a
`FlexModel` of that model with eager attention, `decode` is `tokenizer.decode`, and `ids` are the tokens of
"{text}".
On many ranks the same code gives the same pictures, and the lowest rank writes them.

| drawn by | what | saved by |
|---|---|---|
| [rich](https://rich.readthedocs.io) | tables, in colours on a terminal | `picture.save`: `.svg` (`.txt`, `.html`) |
| [plotly](https://plotly.com/python) | figures, to point at and zoom into | `save_figure`: `.html` |
| [kaleido](https://github.com/plotly/Kaleido), in a Chromium | the same figures, still | `.png`, `.svg`, `.pdf` |
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
        self.function(**{name: getattr(setting, name) for name in asked}, path=self.path)

    def section(self) -> str:
        """A heading, what it is, the code, the picture."""
        heading, _, text = inspect.cleandoc(self.function.__doc__ or "").partition("\n")
        source = inspect.getsource(self.function)
        body = source.split('"""\n', 1)[1] if source.count('"""') == 2 else source
        code = textwrap.dedent(body).strip().replace("path)", f'"{self.path.name}")')
        shown = f"![{heading.rstrip('.')}](pictures/{self.path.name})"
        about = f"{text.strip()}\n\n" if text.strip() else ""
        return f"## {heading.rstrip('.')}\n{about}```python\n{code}\n```\n{shown}\n\nDrawn by {self.by}.\n"


PICTURES: list[Drawn] = []


def picture(by: str = "plotly and kaleido", suffix: str = ".svg") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        PICTURES.append(Drawn(function, by, suffix))
        return function

    return add


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
def page() -> str:
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
    PAGE.write_text(page(), encoding="utf-8")
    if given.page:
        return
    setting = load(given.model)
    for drawn in PICTURES:
        if not given.names or drawn.name in given.names:
            drawn.draw(setting)
            print(f"{drawn.path.name}: {drawn.path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
