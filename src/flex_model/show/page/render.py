"""``page``: an outline as one file of HTML, and ``frame``: the same within a notebook."""

from __future__ import annotations

import json
from base64 import b64encode
from functools import cache
from hashlib import sha256
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from flex_model.errors import FlexModelError
from flex_model.show.outline import Outline
from flex_model.show.page.data import page_data
from flex_model.show.tree import headline, plain

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

__all__ = ["frame", "page"]

_SCRIPTS = (
    *("dom", "glob", "model", "mesh", "values", "diagram", "copying", "panel", "tree", "search", "hooks", "ranks"),
    "start",
)
_LINES = 200  # of the tree for readers without scripts


def page(outline: Outline) -> str:
    """It asks nothing of any network: the page's own policy forbids it, and any script or style but its own.

    Raises FlexModelError without jinja2, which comes with torch.
    """
    try:
        from jinja2 import Environment
    except ImportError:
        raise FlexModelError("a page needs jinja2; install it, or save as .txt.", page="not-installed") from None

    # `<` cannot end the element that the data is in
    data = json.dumps(page_data(outline), separators=(",", ":")).replace("<", "\\u003c")
    template = Environment(autoescape=True).from_string(_read("page.html"))
    script, style = _script(), _read("style.css")
    tree = plain(outline).splitlines()
    return template.render(
        title=outline.root.row.kind,
        headline=headline(outline),
        tree="\n".join([*tree[:_LINES], "..."] if len(tree) > _LINES else tree),
        policy=f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'",
        script=script,
        style=style,
        data=data,
    )


def frame(outline: Outline, height: int = 680) -> str:
    """The page in a sandboxed frame, for notebooks. ``height``: in pixels."""
    return (
        f'<iframe srcdoc="{escape(page(outline))}" sandbox="allow-scripts" allow="clipboard-write" '
        f'title="{escape(outline.root.row.kind)}" style="width:100%;height:{height}px;border:0"></iframe>'
    )


def _folder() -> Traversable:
    return files("flex_model.show.page")


@cache
def _read(name: str) -> str:
    return _folder().joinpath(name).read_text(encoding="utf-8")


@cache
def _script() -> str:
    parts = "\n".join(_read(f"script/{name}.js") for name in _SCRIPTS)
    return f'(() => {{\n"use strict";\n{parts}}})();\n'


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
