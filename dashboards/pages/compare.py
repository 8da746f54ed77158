"""Two artifacts side by side: every field in which they differ, and their metrics in the same charts."""

from __future__ import annotations

from urllib.parse import urlencode

from nicegui import ui

from dashboards.catalog import Catalog, compare
from dashboards.charts import line_chart, metric_names
from dashboards.pages.artifact import metrics_of
from dashboards.pages.frame import card, frame, guarded
from infra.artifact import Manifest
from infra.store import ArtifactStore

COLUMNS = [
    {"name": name, "label": name, "field": name, "align": "left", "style": "white-space: normal; max-width: 460px"}
    for name in ("field", "a", "b", "change")
]


@guarded
def compare_page(store: ArtifactStore, a: str = "", b: str = "") -> None:
    known = Catalog.read(store)
    left, right = (store.manifest(store.resolve(ref)) if ref else None for ref in (a, b))
    with frame(store, "Compare"):
        _choosers(known, left, right)
        if left is None or right is None:
            ui.label("Choose two artifacts; two of the same stage tell most.").classes("muted")
            return
        _fields(left, right)
        _metrics(store, left, right)


def _choosers(known: Catalog, left: Manifest | None, right: Manifest | None) -> None:
    names = {m.id: "  ".join([m.id, *known.tags_of(m.id)]) for m in known.manifests}
    with ui.row().classes("w-full items-center gap-3 no-wrap"):
        choosers = [
            ui.select(names, value=m.id if m else None, label=side, with_input=True)
            .props("outlined dense options-dense")
            .classes("grow mono")
            for side, m in (("a", left), ("b", right))
        ]

    def go() -> None:
        chosen = {side: c.value for side, c in zip("ab", choosers, strict=True) if c.value}
        ui.navigate.to("/compare?" + urlencode(chosen, safe="/"))

    for chooser in choosers:
        chooser.on_value_change(go)


def _fields(left: Manifest, right: Manifest) -> None:
    found = compare(left, right)
    if not found:
        with card("Fields"):
            ui.label("No field differs.").classes("muted")
    for section in dict.fromkeys(difference.section for difference in found):
        rows = [
            {"field": d.field, "a": d.left, "b": d.right, "change": d.change} for d in found if d.section == section
        ]
        with card(f"{section} · {len(rows)} differ"):
            columns = COLUMNS if any(row["change"] for row in rows) else COLUMNS[:3]
            ui.table(rows=rows, columns=columns, row_key="field").props("flat dense wrap-cells").classes("w-full mono")


def _metrics(store: ArtifactStore, left: Manifest, right: Manifest) -> None:
    runs = {f"{side} {m.id}": metrics_of(store, m) for side, m in (("a", left), ("b", right))}
    first, second = (metric_names(rows) for rows in runs.values())
    shared = [name for name in first if name in second]
    if shared:
        with card("Metrics"), ui.element("div").classes("grid grid-cols-1 md:grid-cols-2 gap-3 w-full"):
            for name in shared:
                ui.echart(line_chart(name, runs)).classes("w-full h-64")
