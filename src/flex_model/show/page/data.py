"""``page_data``: an outline as the plain lists and words that the page's script draws.

Modules are columns, and what many of them share (classes, values, parameters) is stored once and numbered, so that ten
thousand modules stay small.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from dataclasses import asdict
from typing import Any

import torch

from flex_model.show.fold import marks, runs
from flex_model.show.outline import Hooked, Node, Outline
from flex_model.show.page.held import held

__all__ = ["page_data"]

_STYLE = re.compile(r"<style\b.*?</style>", re.DOTALL)  # the page has its own, and its policy allows no other
_SIDES = {"forward": "out", "forward_pre": "in", "full_backward": "in", "full_backward_pre": "out"}


class _Pool:
    """Distinct things, numbered as they come."""

    def __init__(self) -> None:
        self.things: list[Any] = []
        self._numbers: dict[Any, int] = {}

    def number(self, thing: Hashable) -> int:
        if thing not in self._numbers:
            self._numbers[thing] = len(self.things)
            self.things.append(thing)
        return self._numbers[thing]


def page_data(outline: Outline) -> dict[str, Any]:
    """Only what JSON knows."""
    nodes = [*outline.root.walk()]
    share, drawings = held(outline), _Pool()
    return {
        "axes": [asdict(axis) for axis in outline.axes],
        "ranks": outline.ranks,
        "rank": outline.rank,
        "engines": list(outline.engines),
        "groups": list(outline.groups),
        "observed": outline.observed,
        "places": {str(stage): at for stage, at in outline.places.items()},
        "held": asdict(share),
        "diagrams": {name: drawings.number(_STYLE.sub("", drawing)) for name, drawing in outline.diagrams.items()},
        "drawings": drawings.things,
        "hooks": [_hook(hooked, i, node) for i, node in enumerate(nodes) for hooked in node.hooks],
        **_modules(outline.root, nodes),
    }


def _modules(root: Node, nodes: list[Node]) -> dict[str, Any]:
    """Columns of modules, in the order of the tree, and the pools that they point into."""
    of, numbers = marks(root), {id(node): i for i, node in enumerate(nodes)}
    kinds, values, parameters = _Pool(), _Pool(), _Pool()
    columns = {
        "name": [n.row.name for n in nodes],
        "label": [n.label for n in nodes],
        "kind": [kinds.number(n.row.kind) for n in nodes],
        "size": [n.size for n in nodes],
        "here": [n.here for n in nodes],
        "values": [values.number(tuple(n.row.values)) for n in nodes],
        "parameters": [parameters.number(tuple(n.row.parameters)) for n in nodes],
        "runs": [[[numbers[id(m)] for m in run] for run in runs(n.children, of)] for n in nodes],
    }
    some = {  # few modules have these
        "silent": {i: True for i, n in enumerate(nodes) if not n.row.fires},
        "same_as": {i: n.row.same_as for i, n in enumerate(nodes) if n.row.same_as},
        "stages": {i: n.row.stages for i, n in enumerate(nodes) if n.row.stages},
        "unfired": {i: n.unfired for i, n in enumerate(nodes) if n.unfired},
    }
    pools = {
        "kinds": kinds.things,
        "values": [_rows(rows) for rows in values.things],
        "parameters": [_rows(rows) for rows in parameters.things],
    }
    return {"modules": columns, "some": some, "pools": pools}


def _rows(rows: Iterable[Any]) -> list[dict[str, Any]]:
    """Without what is empty."""
    return [{k: v for k, v in asdict(row).items() if v not in ("", (), None)} for row in rows]


def _hook(hooked: Hooked, module: int, node: Node) -> dict[str, Any]:
    row, plan = hooked.row, hooked.plan
    size = _itemsize(hooked, node)
    known = plan.elements is not None and size is not None
    return {
        **asdict(row),
        "module": module,
        "layout": plan.layout,
        "collective": plan.collective,
        "elements": plan.elements,
        "bytes": (plan.elements or 0) * (size or 0) if known else None,
        "refusal": plan.refusal,
    }


def _itemsize(hooked: Hooked, node: Node) -> int | None:
    """Bytes of an element of the first value of the hook's place; None where its dtype is not known."""
    row = hooked.row
    if row.hook_type == "tensor":
        label = row.name.rpartition(".")[2]
        dtypes = [p.dtype for p in node.row.parameters if p.name == label]
    else:
        dtypes = [v.dtype for v in node.row.values if v.side == _SIDES[row.hook_type]]
    dtype = getattr(torch, dtypes[0], None) if dtypes and dtypes[0] else None
    return dtype.itemsize if isinstance(dtype, torch.dtype) else None
