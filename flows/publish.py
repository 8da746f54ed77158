"""What a stage run shows in Prefect: a progress bar while it works, then one markdown page.

Publishing is a courtesy to whoever watches: a slow or absent API is logged and never fails a stage, nor does a damaged
artifact somewhere else in the store that the page's lineage would show. A mistake in our code is raised.
"""

from __future__ import annotations

import base64
import re
import threading
from collections.abc import Iterable, Mapping
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.exceptions import PrefectException
from prefect.logging import get_logger

from flows.console import number, size
from infra.artifact import Artifact
from infra.errors import FathomError
from infra.lineage import lineage
from infra.metrics import Progress
from infra.store import ArtifactStore

UPDATE_SECONDS = 2.0
TIMEOUT_SECONDS = 10.0
IMAGE_BYTES = 400_000  # of all plots of a page together, as base64
# Prefect raises RuntimeError when its server cannot be reached, and errors of its own for a 404 or 409.
API_ERRORS = (httpx.HTTPError, OSError, RuntimeError, PrefectException)


def artifact_key(text: str) -> str:
    """A Prefect artifact key: lowercase letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def create(kind: str, key: str, data: Any, description: str, flow_run_id: UUID | None) -> UUID | None:
    """Create a Prefect artifact on a flow run; None if the API did not take it."""
    wanted = ArtifactCreate(
        key=artifact_key(key), type=kind, data=data, description=description, flow_run_id=flow_run_id
    )
    return _call(lambda client: client.create_artifact(wanted).id)


def _call(request: Any) -> Any:
    try:
        with get_client(httpx_settings={"timeout": TIMEOUT_SECONDS}, sync_client=True) as client:
            return request(client)
    except API_ERRORS as error:
        get_logger("fathom").warning("Prefect's API did not take an artifact: %s", error)
        return None


class ProgressBar:
    """A Prefect progress artifact that follows a stage, sent by a thread of its own so that no stage waits for it."""

    def __init__(self, key: str, flow_run_id: UUID | None) -> None:
        self._key, self._flow_run_id = key, flow_run_id
        self._latest: Progress | None = None
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)
        self._thread.start()

    def __call__(self, progress: Progress) -> None:
        self._latest = progress
        self._wake.set()

    def close(self) -> None:
        """Send what is left; raise what went wrong other than the connection."""
        self._closing.set()
        self._wake.set()
        self._thread.join(2 * TIMEOUT_SECONDS)
        if self._failure is not None:
            raise self._failure

    def _follow(self) -> None:
        artifact_id: UUID | None = None
        try:
            while not (self._closing.is_set() and not self._wake.is_set()):
                self._wake.wait()
                self._wake.clear()
                latest = self._latest
                if latest is not None:
                    artifact_id = self._send(latest, artifact_id)
                self._closing.wait(UPDATE_SECONDS)
        except BaseException as error:
            self._failure = error

    def _send(self, progress: Progress, artifact_id: UUID | None) -> UUID | None:
        percent = round(100 * min(progress.done / max(progress.total, 1), 1.0), 1)
        if artifact_id is None:
            return create("progress", self._key, percent, str(progress), self._flow_run_id)
        update = ArtifactUpdate(data=percent, description=str(progress))
        _call(lambda client: client.update_artifact(artifact_id, update))
        return artifact_id


def publish_page(store: ArtifactStore, artifact: Artifact, title: str, explorer: str, flow_run_id: UUID | None) -> None:
    """The page of a finished run: what was made, from what, how good, and where to look further."""
    try:
        text = page(store, artifact, title, explorer)
    except FathomError as error:
        get_logger("fathom").warning("%s has no page: %s", artifact.id, error)
        return
    create("markdown", artifact.id, text, artifact.id, flow_run_id)


def page(store: ArtifactStore, artifact: Artifact, title: str, explorer: str) -> str:
    """The markdown of `publish_page`: facts, metrics, lineage as Mermaid, plots as data: URIs."""
    manifest = artifact.manifest
    extent = f"{len(manifest.files)} files, {size(manifest.bytes)}"
    seconds = manifest.provenance.wall_seconds
    link = explorer_link(explorer, artifact.id)
    parts = [
        f"# {title}",
        f"[`{artifact.id}`]({link}): {artifact.kind}, {extent}, made in {seconds:.1f} s",
        "## Metrics",
        table(("Metric", "Value"), ((name, number(value)) for name, value in artifact.summary.items())),
        "## Lineage",
        mermaid(lineage(store, artifact.id, "up").to_json(store.tags()), explorer, artifact.id),
        *_plots(artifact),
    ]
    return "\n\n".join(parts) + "\n"


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A markdown table."""
    header = list(header)
    lines = ["| " + " | ".join(header) + " |", "|" + " - |" * len(header)]
    lines += ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def mermaid(graph: Mapping[str, Any], explorer: str, here: str = "") -> str:
    """A lineage (`Lineage.to_json`) as a Mermaid graph whose nodes lead to the explorer."""
    names = {node["id"]: f"n{number}" for number, node in enumerate(graph["nodes"])}
    lines = ["```mermaid", "graph LR"]
    for node in graph["nodes"]:
        tag = next((tag.partition("@")[0] for tag in node["tags"]), node["stage"])
        lines.append(f'  {names[node["id"]]}["{tag}<br/>{node["id"].partition("/")[2]}"]')
        lines.append(f'  click {names[node["id"]]} href "{explorer_link(explorer, node["id"])}" _blank')
    lines += [f"  {names[edge['from']]} -->|{edge['role']}| {names[edge['to']]}" for edge in graph["edges"]]
    if here in names:
        lines.append(f"  style {names[here]} stroke-width:3px")
    return "\n".join([*lines, "```"])


def explorer_link(explorer: str, artifact_id: str) -> str:
    """Address of an artifact's page in the explorer."""
    return f"{explorer}/artifact/{artifact_id}"


def _plots(artifact: Artifact) -> list[str]:
    parts, left = [], IMAGE_BYTES
    for path in sorted(artifact.path.rglob("*.png")):
        encoded = base64.b64encode(path.read_bytes()).decode()
        if len(encoded) <= left:
            left -= len(encoded)
            parts.append(f"![{path.stem}](data:image/png;base64,{encoded})")
    return ["## Plots", *parts] if parts else []
