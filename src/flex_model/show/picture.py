"""``Picture``: what ``fm.show`` gives: the model as a tree in a terminal, as a page in a notebook or a browser."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from flex_model.core.flex_model import FlexModel
from flex_model.errors import FlexModelError
from flex_model.show.observe import Seen, observe
from flex_model.show.outline import Outline, outline
from flex_model.show.tree import plain, rich_tree
from flex_model.trees import as_call

if TYPE_CHECKING:
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
        return rich_tree(self.outline)

    def tree(self, depth: int | None = None) -> str:
        """The tree as text, of ``depth`` levels below the model."""
        return plain(self.outline, depth)

    def _repr_html_(self) -> str:
        """The page in a frame of its own, which can neither read nor change the notebook around it."""
        from flex_model.show.page import frame

        return frame(self.outline)

    def save(self, path: str | Path) -> Path:
        """Write it: ``.txt`` or ``.svg`` the tree, ``.html`` the page. All ranks may call it; the lowest of the model
        writes.

        >>> picture.save("model.html")                                      # doctest: +SKIP

        The page is one file that works without a network: modules to unfold and to search, what passes each and where
        it lies, hooks and their cost, who holds what. Raises FlexModelError for another suffix.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix not in _WRITERS:
            raise FlexModelError(
                f"expected a path that ends in {', '.join(_WRITERS)}, got {path.name!r}.", page="bad-argument"
            )
        if self._writes:
            path.write_text(_WRITERS[suffix](self), encoding="utf-8")
        return path

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
    from io import StringIO

    from rich.console import Console

    width = max(len(line) for line in str(picture).splitlines()) + 4
    console = Console(record=True, file=StringIO(), width=width)
    console.print(picture)
    return console.export_svg(title=picture.outline.root.row.kind)


def _html(picture: Picture) -> str:
    from flex_model.show.page import page

    return page(picture.outline)


_WRITERS: dict[str, Callable[[Picture], str]] = {".txt": lambda picture: f"{picture}\n", ".svg": _svg, ".html": _html}
