"""What all pages share: the header, the width, cards, chips, and the page that says what was not found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from urllib.parse import quote

from nicegui import ui

from dashboards.graph import KIND_COLORS
from infra.errors import FathomError
from infra.store import ArtifactStore

CSS = """
:root { --line: rgba(128, 138, 155, .24); --muted: #75808f; --ground: #f6f7f9; --card: #ffffff; }
.body--dark { --muted: #97a2b2; --ground: #12161c; --card: #1a2029; }
body { background: var(--ground); font-feature-settings: "tnum"; }
.body--dark { background: var(--ground) !important; }
.nicegui-content { padding: 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; }
.muted { color: var(--muted); }
.heading { font-size: .78rem; font-weight: 650; letter-spacing: .06em; text-transform: uppercase; color: var(--muted); }
.mono { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .84rem; }
.chip { display: inline-block; border-radius: 6px; padding: 1px 8px; font-size: .76rem; line-height: 1.5; }
.chip.tag { border: 1px solid var(--line); font-family: ui-monospace, Menlo, Consolas, monospace; }
a.plain { color: inherit; text-decoration: none; } a.plain:hover { text-decoration: underline; }
.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 4px 16px; width: 100%; }
.facts { font-size: .88rem; }
.facts > :nth-child(odd) { color: var(--muted); }
.facts > :nth-child(even) { overflow-wrap: anywhere; }
.q-table__container { background: transparent !important; box-shadow: none !important; }
.q-table th { font-weight: 600; color: var(--muted); }
.q-table td { border-color: var(--line) !important; }
.listing tbody tr { cursor: pointer; }
.nicegui-markdown h1 { font-size: 1.5rem; font-weight: 650; line-height: 1.3; margin: .2em 0 .5em; }
.nicegui-markdown h2 { font-size: 1.2rem; font-weight: 650; line-height: 1.3; margin: 1em 0 .4em; }
.nicegui-markdown h3 { font-size: 1.05rem; font-weight: 650; line-height: 1.3; margin: .8em 0 .3em; }
.nicegui-markdown img { max-width: 100%; border-radius: 6px; }
.lineage { display: block; margin: 0 auto; font-family: inherit; }
.lineage text { fill: #fff; font-size: 10.5px; text-anchor: middle; opacity: .92; }
.lineage text.stage { font-size: 12px; font-weight: 600; opacity: 1; }
.lineage .edge { fill: none; stroke: #8a94a6; stroke-width: 1.2; opacity: .6; }
.lineage .edge:hover, .lineage .edge.near { stroke: #3767d6; stroke-width: 1.8; opacity: 1; }
.lineage marker path { fill: #8a94a6; }
.lineage .node:hover rect { filter: brightness(1.12); }
.lineage .here rect { stroke: #f5b800; stroke-width: 3; }
.lineage .missing rect { opacity: .5; stroke: #75808f; stroke-dasharray: 4 3; }
"""


@contextmanager
def frame(store: ArtifactStore, title: str) -> Iterator[None]:
    """The header and the column that holds a page's content."""
    ui.page_title(f"{title} · Fathom")
    ui.colors(primary="#3767d6")
    ui.add_css(CSS)
    with (
        ui.header().classes("items-center gap-6 px-6 py-2").style("background: #182233; box-shadow: none"),
        ui.row().classes("items-center gap-6 w-full max-w-[1440px] mx-auto no-wrap"),
    ):
        ui.link("Fathom", "/").classes("plain text-lg font-semibold text-white no-underline")
        ui.link("Artifacts", "/").classes("plain text-slate-200 no-underline")
        ui.link("Compare", "/compare").classes("plain text-slate-200 no-underline")
        ui.label(store.root).classes("mono text-slate-400 ml-auto ellipsis").tooltip("the store")
    with ui.column().classes("w-full max-w-[1440px] mx-auto px-6 py-5 gap-4"):
        yield


def guarded(page: Callable[..., Any]) -> Callable[..., Any]:
    """Show a user's error (an unknown id, a manifest that cannot be read) as a page instead of a trace."""

    @wraps(page)
    def shown(store: ArtifactStore, *args: Any, **kwargs: Any) -> None:
        try:
            page(store, *args, **kwargs)
        except FathomError as error:
            with frame(store, type(error).__name__), ui.column().classes("card w-full"):
                ui.label(type(error).__name__).classes("text-lg font-semibold")
                ui.label(str(error)).classes("mono")
                ui.link("All artifacts", "/")

    return shown


@contextmanager
def card(heading: str, classes: str = "") -> Iterator[None]:
    """A white box with a small heading."""
    with ui.column().classes(f"card w-full gap-2 {classes}"):
        ui.label(heading).classes("heading")
        yield


def kind_chip(kind: str) -> None:
    ui.label(kind).classes("chip text-white").style(f"background: {KIND_COLORS.get(kind, '#75808f')}")


def tag_chip(name: str) -> None:
    ui.label(name).classes("chip tag")


def facts(rows: list[tuple[str, str]]) -> None:
    """Names and values in two columns."""
    with ui.element("div").classes("facts"):
        for name, value in rows:
            ui.label(name)
            ui.label(value).classes("mono")


def table(rows: list[dict[str, str]]) -> None:
    """Rows as they are, columns in order of appearance."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    columns = [
        {"name": n, "label": n, "field": n, "align": "left", "style": "white-space: normal; max-width: 520px"}
        for n in names
    ]
    keyed = [{"_row": n, **row} for n, row in enumerate(rows)]
    ui.table(rows=keyed, columns=columns, row_key="_row").props("flat dense wrap-cells").classes("w-full mono")


def file_address(artifact_id: str, path: str) -> str:
    return f"/files/{artifact_id}/{quote(path)}"
