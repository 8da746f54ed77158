"""A lineage as a drawing: nodes in layers from raw inputs to results, as one SVG.

Sugiyama, Tagawa and Toda (1981): layers are longest paths from a root; an edge that passes over layers takes a place in
each of them, so that no line runs behind a node; the order within a layer is the mean place of the neighbours, a few
sweeps in each direction, which leaves few crossings. The colours of lines and text come from the page's style sheet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from dashboards.catalog import headline

COLUMN, ROW, LANE = 198, 58, 18  # pixels: from layer to layer, height of a node's place, of a passing edge's
WIDTH, HEIGHT, MARGIN = 160, 42, 14
SWEEPS = 8
LEGIBLE = 0.8  # smallest scale; a wider drawing scrolls
CHARACTERS = 25
KIND_COLORS = {
    "documents": "#3b82c4",
    "tokenizer": "#8b6fd6",
    "tokens": "#3f9e9a",
    "checkpoint": "#d97a2b",
    "conversations": "#5b8c3e",
    "problems": "#a8862a",
    "rollouts": "#c2577f",
    "preferences": "#9a6b8f",
    "reward_model": "#b4513e",
    "report": "#5f6b7d",
    "export": "#7a5c99",
}
Edge = tuple[str, str]


@dataclass(frozen=True)
class Place:
    """What stands in a layer: a node, or the lane of a node's edges that pass on to later layers."""

    id: str
    lane: bool = False


def layers(ids: Sequence[str], edges: Sequence[Edge]) -> list[list[Place]]:
    """Places by layer; every edge goes from a lower layer to a higher. `ids` come parents first."""
    parents: dict[str, list[str]] = {i: [] for i in ids}
    children: dict[str, list[str]] = {i: [] for i in ids}
    for parent, child in edges:
        parents[child].append(parent)
        children[parent].append(child)
    depth: dict[str, int] = {}
    for i in ids:
        depth[i] = max((depth[p] + 1 for p in parents[i]), default=0)
    for i in ids:  # a root stands just before what is first made of it, not far off at the left
        if not parents[i] and children[i]:
            depth[i] = min(depth[c] for c in children[i]) - 1
    columns: list[list[Place]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for i in ids:
        columns[depth[i]].append(Place(i))
        for layer in range(depth[i] + 1, max((depth[c] for c in children[i]), default=0)):
            columns[layer].append(Place(i, lane=True))
    for sweep in range(SWEEPS):
        step = 1 if sweep % 2 == 0 else -1
        order = range(len(columns)) if step == 1 else range(len(columns) - 1, -1, -1)
        for layer in order:
            beside = columns[layer - step] if 0 <= layer - step < len(columns) else []
            near = {place: n - (len(beside) - 1) / 2 for n, place in enumerate(beside)}
            column = columns[layer]
            own = {place: n - (len(column) - 1) / 2 for n, place in enumerate(column)}

            def mean(place: Place, near: dict[Place, float] = near, own: dict[Place, float] = own) -> float:
                family = [place.id] if place.lane else []
                family += parents[place.id] if step == 1 and not place.lane else []  # noqa: B023
                family += children[place.id] if step == -1 else []  # noqa: B023
                found = [near[p] for i in family for p in (Place(i), Place(i, lane=True)) if p in near]
                return sum(found) / len(found) if found else own[place]

            column.sort(key=mean)
    return columns


def positions(columns: Sequence[Sequence[Place]]) -> tuple[dict[tuple[Place, int], tuple[float, float]], float, float]:
    """(left edge and middle of every place by (place, layer), width, height) of the drawing in pixels."""
    heights = [sum(LANE if place.lane else ROW for place in column) for column in columns]
    height = max(heights, default=ROW)
    found: dict[tuple[Place, int], tuple[float, float]] = {}
    for layer, column in enumerate(columns):
        y = (height - heights[layer]) / 2 + MARGIN  # a column stands in the middle
        for place in column:
            step = LANE if place.lane else ROW
            found[place, layer] = (MARGIN + layer * COLUMN, y + step / 2)
            y += step
    return found, COLUMN * (len(columns) - 1) + WIDTH + 2 * MARGIN, height + 2 * MARGIN


def lineage_svg(graph: Mapping[str, Any], here: str) -> str:
    """`Lineage.to_json` as an SVG whose nodes are links; the artifact `here` stands out."""
    nodes = {node["id"]: node for node in graph["nodes"]}
    columns = layers(list(nodes), [(edge["from"], edge["to"]) for edge in graph["edges"]])
    places, width, height = positions(columns)
    home = {place.id: layer for layer, column in enumerate(columns) for place in column if not place.lane}
    lines = [_line(edge, home, places, here) for edge in graph["edges"]]
    boxes = [_box(nodes[i], places[Place(i), layer], i == here) for i, layer in home.items()]
    return (
        f'<svg class="lineage" viewBox="0 0 {width:g} {height:g}" '
        f'style="width: 100%; min-width: {LEGIBLE * width:.0f}px; max-width: {width:g}px" role="img">'
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z"/></marker></defs>' + "".join([*lines, *boxes]) + "</svg>"
    )


def _line(
    edge: Mapping[str, str], home: Mapping[str, int], places: Mapping[Any, tuple[float, float]], here: str
) -> str:
    """A curve from the parent's right side through its lanes to the child's left side."""
    parent, child = edge["from"], edge["to"]
    x, y = places[Place(parent), home[parent]]
    path = f"M{x + WIDTH:g} {y:g}"
    x += WIDTH
    for layer in range(home[parent] + 1, home[child] + 1):
        last = layer == home[child]
        to_x, to_y = places[Place(child) if last else Place(parent, lane=True), layer]
        bend = (to_x - x) / 2
        path += f"C{x + bend:g} {y:g} {to_x - bend:g} {to_y:g} {to_x:g} {to_y:g}"
        x, y = to_x, to_y
        if not last:
            x += WIDTH
            path += f"H{x:g}"
    near = " near" if here in (parent, child) else ""
    return f'<path class="edge{near}" d="{path}" marker-end="url(#arrow)"><title>{escape(edge["role"])}</title></path>'


def _box(node: Mapping[str, Any], place: tuple[float, float], here: bool) -> str:
    x, middle = place
    stage, _, digest = node["id"].partition("/")
    if node["missing"]:
        about, second, color = [node["id"], "collected since: only its id is known"], "collected", "#9aa3b2"
    else:
        about = [node["id"], node["kind"], " ".join(node["tags"]), headline(node["summary"])]
        second, color = (node["tags"] or [digest])[0], KIND_COLORS.get(node["kind"], "#75808f")
    classes = "node" + (" here" if here else "") + (" missing" if node["missing"] else "")
    target = "" if node["missing"] else f' href="/artifact/{escape(node["id"])}"'
    return (
        f'<a class="{classes}"{target} transform="translate({x:g} {middle - HEIGHT / 2:g})">'
        f"<title>{escape(chr(10).join(text for text in about if text))}</title>"
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="7" fill="{color}"/>'
        f'<text x="{WIDTH / 2:g}" y="17" class="stage">{escape(_short(stage))}</text>'
        f'<text x="{WIDTH / 2:g}" y="33">{escape(_short(second))}</text></a>'
    )


def _short(text: str) -> str:
    return text if len(text) <= CHARACTERS else text[: CHARACTERS - 1] + "…"
