"""One artifact: what it is, how it went, what it was made from, what was made from it, and its files."""

from __future__ import annotations

import io
import re
from typing import Any
from urllib.parse import urlencode

from nicegui import run, ui

from dashboards import catalog
from dashboards.catalog import Catalog, figure, flatten, size
from dashboards.charts import line_chart, metric_names
from dashboards.pages.frame import card, facts, file_address, frame, guarded, kind_chip, table, tag_chip
from dashboards.preview import IMAGES, preview
from infra.artifact import FileEntry, Manifest
from infra.metrics import METRICS, parse_metrics
from infra.store import ArtifactStore

REPORT = "report.md"
FILES_SHOWN = 60
BUTTON = "outline no-caps size=13px padding='4px 12px'"


@guarded
def artifact_page(store: ArtifactStore, artifact_id: str) -> None:
    known = Catalog.read(store)
    manifest = store.manifest(store.resolve(artifact_id))
    with frame(store, manifest.id):
        _title(store, manifest, known)
        with ui.element("div").classes("grid grid-cols-1 lg:grid-cols-3 gap-4 w-full items-start"):
            with ui.column().classes("lg:col-span-2 gap-4 w-full min-w-0"):
                _summary(manifest)
                _metrics(metrics_of(store, manifest))
                _report(store, manifest)
                _pictures(manifest)
                _files(store, manifest)
            with ui.column().classes("gap-4 w-full min-w-0"):
                _relatives(manifest, known)
                with card("Config"):
                    facts([(name, figure(value)) for name, value in flatten(manifest.config)] or [("", "no fields")])
                with card("Provenance"):
                    facts(catalog.facts(manifest))


def metrics_of(store: ArtifactStore, manifest: Manifest) -> list[dict[str, Any]]:
    """Rows of the artifact's metrics file; none if it has none."""
    if all(file.path != METRICS for file in manifest.files):
        return []
    with store.open(manifest, METRICS) as handle:
        return parse_metrics(io.TextIOWrapper(handle, encoding="utf-8").read())


def _title(store: ArtifactStore, manifest: Manifest, known: Catalog) -> None:
    with ui.row().classes("w-full items-center gap-3"):
        stage, _, digest = manifest.id.partition("/")
        with ui.row().classes("items-baseline gap-0"):
            ui.label(stage).classes("text-2xl font-semibold")
            ui.label(f"/{digest}").classes("text-xl muted mono")
        kind_chip(manifest.kind)
        for name in known.tags_of(manifest.id):
            tag_chip(name)
        with ui.row().classes("ml-auto gap-2"):
            _action("Lineage", "account_tree", f"/lineage/{manifest.id}")
            _action("Compare", "compare_arrows", f"/compare?{urlencode({'a': manifest.id}, safe='/')}")
            verify = ui.button("Verify", icon="verified").props(BUTTON)

    async def check() -> None:
        verify.props("loading")
        faults = await run.io_bound(store.verify, manifest.id)
        verify.props(remove="loading")
        if faults:
            told = "; ".join(f"{fault.path}: {fault.problem}" for fault in faults[:5])
            ui.notify(told, type="negative", timeout=0, close_button="Close")
        else:
            ui.notify(f"{len(manifest.files)} files are as the manifest says", type="positive")

    verify.on_click(check)


def _action(text: str, icon: str, target: str) -> None:
    ui.button(text, icon=icon, on_click=lambda: ui.navigate.to(target)).props(BUTTON)


def _summary(manifest: Manifest) -> None:
    with card("Summary"):
        if not manifest.summary:
            ui.label("nothing was measured").classes("muted")
        with ui.element("div").classes("grid grid-cols-2 md:grid-cols-4 gap-x-6 gap-y-3 w-full"):
            for name, value in manifest.summary.items():
                text = figure(value)
                with ui.column().classes("gap-0 min-w-0"):
                    ui.label(text).classes("font-semibold " + ("text-lg" if len(text) < 14 else "text-sm")).style(
                        "overflow-wrap: anywhere"
                    )
                    ui.label(name).classes("muted text-xs")


def _metrics(rows: list[dict[str, Any]]) -> None:
    names = metric_names(rows)
    if not names:
        return
    with card(f"Metrics · {len(rows)} rows"), ui.element("div").classes("grid grid-cols-1 md:grid-cols-2 gap-3 w-full"):
        for name in names:
            ui.echart(line_chart(name, {"": rows})).classes("w-full h-56")


def _report(store: ArtifactStore, manifest: Manifest) -> None:
    if any(file.path == REPORT for file in manifest.files):
        with card("Report"):
            with store.open(manifest, REPORT) as handle:
                text = handle.read().decode(errors="replace")
            ui.markdown(with_file_addresses(text, manifest)).classes("w-full")


def with_file_addresses(text: str, manifest: Manifest) -> str:
    """Markdown whose links and pictures name files of the artifact, with the addresses that serve them."""
    paths = {file.path for file in manifest.files}

    def address(match: re.Match[str]) -> str:
        path = match[2].removeprefix("./")
        return f"{match[1]}({file_address(manifest.id, path)})" if path in paths else match[0]

    return re.sub(r"(\[[^\]]*\])\(([^)\s]+)\)", address, text)


def _pictures(manifest: Manifest) -> None:
    pictures = [file.path for file in manifest.files if f".{file.path.rpartition('.')[2].lower()}" in IMAGES]
    if not pictures or any(file.path == REPORT for file in manifest.files):
        return
    with card("Plots"), ui.element("div").classes("grid grid-cols-1 md:grid-cols-2 gap-3 w-full"):
        for path in pictures:
            with ui.link(target=file_address(manifest.id, path), new_tab=True):
                ui.image(file_address(manifest.id, path)).classes("w-full rounded").tooltip(path)


def _relatives(manifest: Manifest, known: Catalog) -> None:
    present = {m.id: m for m in known.manifests}
    with card("Made from"):
        for role, parent in manifest.inputs.items():
            _relative(role, parent, present.get(parent), known)
        if not manifest.inputs:
            ui.label("no artifact: a source").classes("muted")
    children = known.children(manifest.id)
    if children:
        with card(f"Used by · {len(children)}"):
            for role, child in children:
                _relative(role, child.id, child, known)


def _relative(role: str, artifact_id: str, manifest: Manifest | None, known: Catalog) -> None:
    with ui.column().classes("gap-0 w-full"):
        with ui.row().classes("items-center gap-2"):
            if manifest:
                ui.link(artifact_id, f"/artifact/{artifact_id}").classes("mono")
                kind_chip(manifest.kind)
            else:
                ui.label(f"{artifact_id} (collected)").classes("mono muted")
            for name in known.tags_of(artifact_id):
                tag_chip(name)
        ui.label(f"as {role}").classes("muted text-xs")


def _files(store: ArtifactStore, manifest: Manifest) -> None:
    with card(f"Files · {len(manifest.files)} · {size(manifest.bytes)}"):
        for file in manifest.files[:FILES_SHOWN]:
            _file(store, manifest, file)
        if len(manifest.files) > FILES_SHOWN:
            ui.label(f"and {len(manifest.files) - FILES_SHOWN} more").classes("muted")


def _file(store: ArtifactStore, manifest: Manifest, file: FileEntry) -> None:
    """A line that opens to the file's beginning, read when it is opened."""
    with ui.expansion(f"{file.path}  ·  {size(file.bytes)}").classes("w-full mono").props("dense") as line:
        body = ui.column().classes("w-full gap-1")

    async def show() -> None:
        if not line.value or body.default_slot.children:
            return
        found = await run.io_bound(preview, store, manifest, file.path)
        if found is None:  # the server is being stopped
            return
        with body:
            with ui.row().classes("items-center gap-4"):
                ui.link("open", file_address(manifest.id, file.path), new_tab=True).classes("text-xs")
                ui.label(f"sha256 {file.sha256[:16]}…  {found.note}").classes("muted text-xs")
            if found.form in ("text", "json"):
                ui.code(found.text, language="json" if found.form == "json" else None).classes("w-full")
            elif found.form == "table":
                table(list(found.rows))
            elif found.form == "image":
                ui.image(file_address(manifest.id, file.path)).classes("w-full max-w-3xl")

    line.on_value_change(show)
