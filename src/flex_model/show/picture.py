"""``Picture``: what ``fm.show`` gives: the model as a tree in a terminal, as a page in a notebook or a browser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from flex_model.core.flex_model import FlexModel
from flex_model.errors import FlexModelError
from flex_model.show.observe import Seen, observe
from flex_model.show.outline import Outline, outline
from flex_model.show.tree import plain, rich_tree
from flex_model.table import as_svg
from flex_model.trees import as_call

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import RenderableType

__all__ = ["Picture", "picture", "tree_of"]

_seen: WeakKeyDictionary[FlexModel, Seen] = WeakKeyDictionary()  # in the last forward that was looked at


class Picture:
    """Printed it is a tree; in a notebook a page. ``outline`` is what it draws.

    >>> picture = fm.show(batch)                                            # doctest: +SKIP
    >>> print(picture)                                                      # doctest: +SKIP
    >>> picture.save("model.html")                                          # doctest: +SKIP
    """

    def __init__(self, outline: Outline) -> None:
        self.outline = outline

    def __str__(self) -> str:
        return plain(self.outline)

    __repr__ = __str__

    def __rich__(self) -> RenderableType:
        return self.drawn()

    def drawn(self, depth: int | None = None) -> RenderableType:
        """The tree in colours, for ``rich.print``, of ``depth`` levels below the model."""
        return rich_tree(self.outline, depth)

    def tree(self, depth: int | None = None) -> str:
        """The tree as text, of ``depth`` levels below the model."""
        return plain(self.outline, depth)

    def save(self, path: str | Path) -> Path:
        """Write it: ``.txt`` or ``.svg`` the tree. All ranks may call it; the lowest of the model writes."""
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix not in (".txt", ".svg"):
            raise FlexModelError(f"expected a path that ends in .txt or .svg, got {path.name!r}.", page="bad-argument")
        if self.outline.rank == _lowest(self.outline.ranks):
            text = f"{self}\n" if suffix == ".txt" else _svg(self)
            path.write_text(text, encoding="utf-8")
        return path


def picture(fm: FlexModel, inputs: Any, forward: Callable[..., Any] | None) -> Picture:
    """Look at one forward of ``inputs``, if there are any, and draw what is known. Collective with inputs."""
    if inputs is not None:
        args, kwargs = as_call(inputs)
        _seen[fm] = observe(fm, args, kwargs, forward)
    return Picture(outline(fm._runtime, _seen.get(fm), together=inputs is not None))


def tree_of(fm: FlexModel) -> str:
    """What is known by now; never collective."""
    fm._runtime.notice()
    return plain(outline(fm._runtime, _seen.get(fm)))


def _lowest(ranks: Any) -> int:
    return min(map(_lowest, ranks)) if isinstance(ranks, list) else ranks


def _svg(picture: Picture) -> str:
    width = max(len(line) for line in str(picture).splitlines()) + 4
    return as_svg(picture, width=width, title=picture.outline.root.row.kind)
