"""The explorer: `python -m dashboards.app --store URL --port PORT`, both from the settings unless given.

It binds to this machine alone, only reads (nothing here changes a store), and loads nothing from the network.
"""

from __future__ import annotations

import argparse
import mimetypes
import sys
from collections.abc import Iterator
from typing import BinaryIO

from fastapi import HTTPException
from fastapi.responses import Response, StreamingResponse
from nicegui import app, ui

from dashboards.pages.artifact import artifact_page
from dashboards.pages.artifacts import artifacts_page
from dashboards.pages.compare import compare_page
from dashboards.pages.lineage import lineage_page
from dashboards.preview import IMAGES
from infra.errors import FathomError
from infra.settings import Settings
from infra.store import ArtifactStore

CHUNK = 1 << 20


def add_pages(store: ArtifactStore) -> None:
    """Declare every page, and the address that serves artifacts' files."""

    @ui.page("/")
    def _artifacts() -> None:
        artifacts_page(store)

    @ui.page("/artifact/{stage}/{digest}")
    def _artifact(stage: str, digest: str) -> None:
        artifact_page(store, f"{stage}/{digest}")

    @ui.page("/lineage/{stage}/{digest}")
    def _lineage(stage: str, digest: str, direction: str = "both") -> None:
        lineage_page(store, f"{stage}/{digest}", direction)

    @ui.page("/compare")
    def _compare(a: str = "", b: str = "") -> None:
        compare_page(store, a, b)

    @app.get("/files/{stage}/{digest}/{path:path}")
    def _file(stage: str, digest: str, path: str) -> Response:
        return file_response(store, f"{stage}/{digest}", path)


def file_response(store: ArtifactStore, artifact_id: str, path: str) -> Response:
    """A file that the manifest names: pictures and text are shown, the rest is a download. Nothing runs as a page."""
    try:
        handle = store.open(store.manifest(artifact_id), path)
    except FathomError as error:
        raise HTTPException(404, str(error)) from None
    guessed = mimetypes.guess_type(path)[0] or ""
    shown = path[path.rfind(".") :].lower() in IMAGES
    text = guessed.startswith("text/") or path.endswith((".json", ".jsonl"))
    media = guessed if shown else "text/plain; charset=utf-8" if text else "application/octet-stream"
    headers = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox"}
    return StreamingResponse(_chunks(handle), media_type=media, headers=headers)


def _chunks(handle: BinaryIO) -> Iterator[bytes]:
    with handle:
        while chunk := handle.read(CHUNK):
            yield chunk


def main(arguments: list[str] | None = None) -> int:
    """Serve until interrupted; exit codes as the `fathom` command's."""
    parser = argparse.ArgumentParser(prog="python -m dashboards.app", description=__doc__.partition("\n")[0])
    parser.add_argument("--store", help="a folder or URL (default: the setting `store`)")
    parser.add_argument("--port", type=int, help="default: the setting `explorer_port`")
    given = parser.parse_args(arguments)
    try:
        settings = Settings.load()
        store = ArtifactStore(given.store or settings.store, settings.workspace)
    except FathomError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    add_pages(store)
    port = given.port or settings.explorer_port
    print(f"explorer of {store.root} on http://127.0.0.1:{port}", flush=True)
    ui.run(
        host="127.0.0.1",
        port=port,
        title="Fathom",
        favicon="🌊",
        dark=None,
        show=False,
        reload=False,
        show_welcome_message=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
