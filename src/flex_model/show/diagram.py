"""``diagram``: the flow inside a module as SVG. igraph places the nodes, in layers (Sugiyama's method)."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from importlib.util import find_spec
from typing import Any

from flex_model.show.flow import IN, OUT, Flow

__all__ = ["diagram", "diagrams"]

_WIDE, _HIGH, _GAP = 7.5, 28, 26  # of a character, a node, and between layers
_STYLE = (
    ".node{fill:none;stroke:currentColor;stroke-opacity:.55}.end{stroke-dasharray:3 3}"
    ".edge{fill:none;stroke:currentColor;stroke-opacity:.55}"
    ".label{fill:currentColor;font:12px ui-monospace,monospace;text-anchor:middle;dominant-baseline:central}"
)


def diagrams(flows: Mapping[str, Flow]) -> dict[str, str]:
    """{name of a module: its diagram}; none without igraph."""
    return {name: diagram(flow) for name, flow in flows.items()} if find_spec("igraph") else {}


def diagram(flow: Flow) -> str:
    """From ``in`` at the top to ``out`` at the bottom, in the colour of the text around it."""
    import igraph

    labels = sorted(flow.labels, key=lambda label: (label != IN, label == OUT))
    arrows = [(labels.index(a), labels.index(b)) for a, b in flow.arrows]
    graph = igraph.Graph(n=len(labels), edges=arrows, directed=True)
    layout: Any = graph.layout_sugiyama(maxiter=200)
    bends = layout.edge_routing  # where an arrow passes layers
    widths = [max(_HIGH, len(_shown(label)) * _WIDE + 16) for label in labels]
    coords = [*layout.coords[: len(labels)], *(place for turns in bends for place in turns)]
    places = _spread(coords, widths)
    rest = iter(places[len(labels) :])
    parts = []
    for (start, end), turns in zip(arrows, bends, strict=True):
        parts.append(_path([places[start], *(next(rest) for _ in turns), places[end]]))
    parts += [_node(label, *place, width) for label, place, width in zip(labels, places, widths, strict=False)]
    wide = max(x + w / 2 for (x, _), w in zip(places, [*widths, *[8.0] * len(places)], strict=False)) + 8
    high = max(y for _, y in places) + _HIGH
    says = escape("; ".join(f"{a} to {b}" for a, b in flow.arrows))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:.0f} {high:.0f}" width="{wide:.0f}" '
        f'height="{high:.0f}" role="img" aria-label="{says}"><style>{_STYLE}</style>'
        f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="currentColor" fill-opacity=".55"/></marker></defs>{"".join(parts)}</svg>'
    )


def _shown(label: str) -> str:
    return label.partition(" ")[0] if label[:1] in "+\u00d7" else label


def _spread(coords: list[list[float]], widths: list[float]) -> list[tuple[float, float]]:
    """igraph's places in pixels: columns as wide as their widest node, layers as high as a node and a gap."""
    widest: dict[float, float] = {}
    for place, (x, _) in enumerate(coords):
        width = widths[place] if place < len(widths) else 8.0
        widest[round(x, 3)] = max(width, widest.get(round(x, 3), 0.0))
    left, at = 8.0, {}
    for column in sorted(widest):
        at[column] = left + widest[column] / 2
        left += widest[column] + 14
    return [(at[round(x, 3)], _HIGH / 2 + 8 + y * (_HIGH + _GAP)) for x, y in coords]


def _path(points: list[tuple[float, float]]) -> str:
    """A line through the places that igraph keeps free for it, curved between layers."""
    (x, y), half = points[0], _HIGH / 2
    steps = [f"M{x:.1f} {y + half:.1f}"]
    for i, (a, b) in enumerate(points[1:], 1):
        last = i == len(points) - 1
        start = y + (half if i == 1 else 0)
        end = b - half if last else b
        middle = (start + end) / 2
        steps.append(f"C{x:.1f} {middle:.1f} {a:.1f} {middle:.1f} {a:.1f} {end:.1f}")
        x, y = a, b
    return f'<path class="edge" marker-end="url(#tip)" d="{"".join(steps)}"/>'


def _node(label: str, x: float, y: float, width: float) -> str:
    text = _shown(label)
    half, ends = width / 2, label in (IN, OUT)
    if label[:1] in "+\u00d7":
        shape = f'<circle class="node" cx="{x:.1f}" cy="{y:.1f}" r="{_HIGH / 2:.0f}"/>'
    else:
        shape = (
            f'<rect class="node{" end" if ends else ""}" x="{x - half:.1f}" y="{y - _HIGH / 2:.1f}" '
            f'width="{width:.1f}" height="{_HIGH}" rx="6"/>'
        )
    return f'{shape}<text class="label" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
