"""The graph above, below and around one artifact."""

from __future__ import annotations

from nicegui import ui

from dashboards.graph import lineage_svg
from dashboards.pages.frame import card, frame, guarded, kind_chip
from infra.lineage import lineage
from infra.store import ArtifactStore

DIRECTIONS = {"up": "Made from", "down": "Used by", "both": "Both"}


@guarded
def lineage_page(store: ArtifactStore, artifact_id: str, direction: str = "both") -> None:
    here = store.resolve(artifact_id)
    direction = direction if direction in DIRECTIONS else "both"
    graph = lineage(store, here, direction).to_json(store.tags())  # type: ignore[arg-type]
    with frame(store, f"Lineage of {here}"):
        with ui.row().classes("w-full items-center gap-3"):
            ui.label("Lineage of").classes("text-xl muted")
            ui.link(here, f"/artifact/{here}").classes("text-xl mono plain")
            ui.toggle(
                DIRECTIONS, value=direction, on_change=lambda e: ui.navigate.to(f"/lineage/{here}?direction={e.value}")
            ).props("no-caps unelevated padding='3px 14px'").classes("ml-auto")
        with card(f"{len(graph['nodes'])} artifacts · {len(graph['edges'])} uses"):
            ui.html(lineage_svg(graph, here), sanitize=False).classes("w-full overflow-x-auto")
            ui.run_javascript("document.querySelector('.lineage .here').scrollIntoView({inline: 'center'})")
            with ui.row().classes("gap-2 items-center"):
                for kind in sorted({node["kind"] for node in graph["nodes"] if not node["missing"]}):
                    kind_chip(kind)
                ui.label("A node leads to its artifact; resting on one shows its summary.").classes("muted text-sm")
