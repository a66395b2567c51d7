"""``Picture``: what ``fm.show`` gives: the model as a tree in a terminal, as a page in a notebook or a browser."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from flex_model.core.flex_model import FlexModel
from flex_model.errors import FlexModelError
from flex_model.show.observe import Seen, observe
from flex_model.show.outline import Outline, outline
from flex_model.show.page import frame, page
from flex_model.show.tree import plain, rich_tree
from flex_model.stills import STILLS, save_svg
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
    >>> picture.open()                                                      # doctest: +SKIP
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

    def _repr_html_(self) -> str:
        """The page in a frame of its own, which can neither read nor change the notebook around it."""
        return frame(self.outline)

    def save(self, path: str | Path) -> Path:
        """Write the page as ``.html``, or the tree as ``.txt``, ``.svg``, ``.png`` or ``.pdf`` (the last two are drawn
        by a Chromium). All ranks may call it; the lowest of the model writes.

        >>> picture.save("model.html")                                      # doctest: +SKIP

        The page is one file that works without a network: modules to unfold and to search, what passes each and where
        it lies, hooks and their cost, who holds what. Raises FlexModelError for another suffix.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix not in (".html", ".txt", *STILLS):
            raise FlexModelError(
                f"expected a path that ends in .html, .txt, {', '.join(STILLS)}, got {path.name!r}.",
                page="bad-argument",
            )
        if not self._writes:
            return path
        if suffix in STILLS:
            return save_svg(_svg(self), path)
        path.write_text(f"{self}\n" if suffix == ".txt" else page(self.outline), encoding="utf-8")
        return path

    def save_diagram(self, module: str, path: str | Path) -> Path:
        """Write how values flow between the modules that ``module`` calls, as ``.svg``, ``.png`` or ``.pdf``.

        >>> picture.save_diagram("model.layers.0", "block.svg")            # doctest: +SKIP

        Raises FlexModelError where nothing is known of it: no forward was looked at, it calls no modules, or it is
        alike another, which is drawn in its place.
        """
        diagrams = self.outline.diagrams
        if module not in diagrams:
            raise FlexModelError(
                f"there is no diagram of {module!r}; expected one of {', '.join(map(repr, diagrams)) or 'none'}.",
                page="bad-argument",
            )
        return save_svg(diagrams[module], path) if self._writes else Path(path)

    def open(self) -> Path:
        """Write the page to a temporary file and show it in the browser; gives the file, which stays.

        >>> picture.open()                                                  # doctest: +SKIP

        All ranks may call it; the lowest of the model opens.
        """
        path = self.save(Path(mkdtemp(prefix="flex-model-")) / "model.html")
        if self._writes:
            webbrowser.open(path.as_uri())
        return path

    @property
    def _writes(self) -> bool:
        return self.outline.rank == _lowest(self.outline.ranks)


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
