"""The listing: every artifact, newest first, filtered and sorted in place."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

from nicegui import ui

from dashboards.catalog import Catalog, duration, select, size
from dashboards.graph import KIND_COLORS
from dashboards.pages.frame import frame, guarded
from infra.store import ArtifactStore

COLUMNS: list[dict[str, Any]] = [
    {"name": "id", "label": "Artifact", "field": "id", "align": "left", "sortable": True},
    {"name": "kind", "label": "Kind", "field": "kind", "align": "left", "sortable": True},
    {"name": "headline", "label": "Summary", "field": "headline", "align": "left",
     "style": "white-space: normal; min-width: 260px"},
    {"name": "tags", "label": "Tags", "field": "tags", "align": "left", "sortable": True,
     "style": "white-space: normal"},
    {"name": "created", "label": "Created", "field": "created", "align": "left", "sortable": True},
    {"name": "seconds", "label": "Took", "field": "seconds", "align": "right", "sortable": True},
    {"name": "bytes", "label": "Size", "field": "bytes", "align": "right", "sortable": True},
]  # fmt: skip
CELLS = {
    "id": """<q-td :props="props"><a class="plain" :href="'/artifact/' + props.row.id">
        <span class="font-semibold">{{ props.row.stage }}</span
        ><span class="muted mono">/{{ props.row.id.split('/')[1] }}</span></a></q-td>""",
    "kind": """<q-td :props="props"><span class="chip text-white" :style="{background: COLORS[props.value]}">
        {{ props.value }}</span></q-td>""",
    "tags": """<q-td :props="props"><span v-for="tag in props.value.split(' ').filter(t => t)" :key="tag"
        class="chip tag q-mr-xs">{{ tag }}</span></q-td>""",
    "created": """<q-td :props="props"><span :title="props.value">{{ props.row.ago }}</span></q-td>""",
    "seconds": """<q-td :props="props">{{ props.row.wall }}</q-td>""",
    "bytes": """<q-td :props="props">{{ props.row.size }}</q-td>""",
}


@guarded
def artifacts_page(store: ArtifactStore) -> None:
    catalog = Catalog.read(store)
    rows = catalog.rows(datetime.now(UTC))
    with frame(store, "Artifacts"):
        _totals(catalog)
        if catalog.broken:
            with ui.column().classes("card w-full gap-1"):
                ui.label(f"{len(catalog.broken)} cannot be read").classes("text-negative font-semibold")
                for artifact_id, problem in catalog.broken.items():
                    ui.label(f"{artifact_id}: {problem}").classes("mono")
        if not rows:
            with ui.column().classes("card w-full items-center py-12"):
                ui.label("No artifacts yet").classes("text-lg font-semibold")
                ui.label("fathom run line --recipe tiny").classes("mono muted")
            return
        _listing(rows)


def _totals(catalog: Catalog) -> None:
    """Four figures about the whole store."""
    manifests = catalog.manifests
    figures = {
        "artifacts": str(len(manifests)),
        "stages": str(len({m.stage for m in manifests})),
        "tags": str(len(catalog.tags)),
        "on disk": size(sum(m.bytes for m in manifests)),
        "compute": duration(sum(m.provenance.wall_seconds for m in manifests)),
    }
    with ui.row().classes("gap-8 items-end"):
        for name, value in figures.items():
            with ui.column().classes("gap-0"):
                ui.label(value).classes("text-2xl font-semibold leading-tight")
                ui.label(name).classes("muted text-sm")


def _listing(rows: list[dict[str, Any]]) -> None:
    with ui.column().classes("card w-full gap-2"):
        with ui.row().classes("w-full items-center gap-3"):
            text = ui.input(placeholder="Search id, tag, summary").props("dense outlined clearable").classes("w-80")
            kinds = ui.select(sorted({r["kind"] for r in rows}), multiple=True, label="Kind", value=[])
            stages = ui.select(sorted({r["stage"] for r in rows}), multiple=True, label="Stage", value=[])
            for choice in (kinds, stages):
                choice.props("dense outlined options-dense").classes("w-48")
            tagged = ui.checkbox("tagged")
            count = ui.label().classes("muted text-sm")
            both = ui.button("Compare", icon="compare_arrows").props("flat dense no-caps").classes("ml-auto")
            both.tooltip("choose two rows").disable()
        table = ui.table(
            rows=rows,
            columns=COLUMNS,
            row_key="id",
            selection="multiple",
            pagination={"rowsPerPage": 50, "sortBy": "created", "descending": True},
        )
        table.props("flat dense").classes("w-full listing")
        for name, template in CELLS.items():
            table.add_slot(f"body-cell-{name}", template.replace("COLORS", _javascript(KIND_COLORS)))

    def refresh() -> None:
        table.rows = select(rows, text.value or "", kinds.value, stages.value, tagged.value)
        count.text = f"{len(table.rows)} of {len(rows)}"

    def open_pair() -> None:
        a, b = (row["id"] for row in table.selected[:2])
        ui.navigate.to("/compare?" + urlencode({"a": a, "b": b}, safe="/"))

    for control in (text, kinds, stages, tagged):
        control.on_value_change(refresh)
    table.on("rowClick", lambda event: ui.navigate.to(f"/artifact/{event.args[1]['id']}"))
    table.on_select(lambda: both.set_enabled(len(table.selected) == 2))
    both.on_click(open_pair)
    refresh()


def _javascript(mapping: dict[str, str]) -> str:
    """A JavaScript object that can stand inside a double-quoted attribute."""
    return "({" + ", ".join(f"{key}: '{value}'" for key, value in mapping.items()) + "})"
