"""The pages, through NiceGUI's simulated user, and once in a real browser."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nicegui import ui
from nicegui.testing import User
from nicegui.testing.user_simulation import user_simulation

from dashboards.app import add_pages
from infra.artifact import MANIFEST
from infra.store import ArtifactStore

Visit = Callable[[User], Awaitable[None]]


def visit(store: ArtifactStore, steps: Visit) -> None:
    """Run `steps` as a user of the explorer of that store."""

    async def simulate() -> None:
        async with user_simulation(root=None) as user:
            add_pages(store)
            await steps(user)

    asyncio.run(simulate())


def test_the_listing_shows_every_artifact_and_its_filter_narrows_it(line: Any) -> None:
    async def steps(user: User) -> None:
        await user.open("/")
        await user.should_see("4 of 4")
        table = next(iter(user.find(ui.table).elements))
        assert {row["id"] for row in table.rows} == {line.documents, line.base, line.other, line.report}
        user.find(ui.input).type("base@latest")
        await user.should_see("1 of 4")
        assert [row["id"] for row in table.rows] == [line.base]

    visit(line.store, steps)


def test_an_artifacts_page_tells_summary_config_provenance_inputs_and_files(line: Any) -> None:
    async def steps(user: User) -> None:
        await user.open(f"/artifact/{line.base}")
        for text in ("1\u202f234\u202f567", "learning_rate", "base@latest", line.documents, line.report, "packages"):
            await user.should_see(text)
        await user.should_see("model.json")
        chart = next(iter(user.find(ui.echart).elements))
        assert chart.options["title"]["text"] == "loss"

    visit(line.store, steps)


def test_verify_tells_what_was_tampered_with(line: Any) -> None:
    async def steps(user: User) -> None:
        await user.open(f"/artifact/{line.base}")
        user.find("Verify").click()
        await user.should_see("2 files are as the manifest says")
        (line.store.get(line.base).path / "model.json").write_text("{}")
        user.find("Verify").click()
        await user.should_see("model.json: 2 bytes, manifest says 15")

    visit(line.store, steps)


def test_a_file_opens_to_its_beginning(line: Any) -> None:
    async def steps(user: User) -> None:
        await user.open(f"/artifact/{line.documents}")
        next(iter(user.find(ui.expansion).elements)).open()
        await user.should_see("first 3 of 3 rows")

    visit(line.store, steps)


def test_lineage_draws_the_graph_and_compare_the_differences(line: Any) -> None:
    async def steps(user: User) -> None:
        await user.open(f"/lineage/{line.report}?direction=up")
        await user.should_see("3 artifacts · 2 uses")
        await user.open(f"/lineage/{line.documents}?direction=both")
        await user.should_see("4 artifacts · 3 uses")
        await user.open(f"/compare?a={line.base}&b={line.other}")
        await user.should_see("config · 1 differ")
        chart = next(iter(user.find(ui.echart).elements))
        assert len(chart.options["series"]) == 2

    visit(line.store, steps)


@pytest.mark.parametrize("page", ["artifact", "lineage"])
def test_an_unknown_id_is_said_with_the_nearest(page: str, line: Any) -> None:
    async def steps(user: User) -> None:
        await user.open(f"/{page}/{line.base[:-1]}{'1' if line.base[-1] == '0' else '0'}")
        await user.should_see("ArtifactNotFound")
        await user.should_see(f"did you mean '{line.base}'")

    visit(line.store, steps)


def test_a_broken_manifest_does_not_hide_the_others(line: Any) -> None:
    (line.store.get(line.other).path / MANIFEST).write_text("{")

    async def steps(user: User) -> None:
        await user.open("/")
        await user.should_see("1 cannot be read")
        await user.should_see("3 of 3")

    visit(line.store, steps)


def test_an_empty_store_says_how_to_fill_it(tmp_path: Path) -> None:
    async def steps(user: User) -> None:
        await user.open("/")
        await user.should_see("fathom run line --recipe tiny")

    visit(ArtifactStore(tmp_path / "nothing"), steps)


def test_files_are_served_only_if_the_manifest_names_them_and_never_as_pages(line: Any) -> None:
    (line.store.get(line.report).path / "secret.txt").write_text("not in the manifest")

    async def steps(user: User) -> None:
        picture = await user.http_client.get(f"/files/{line.report}/plot.png")
        assert (picture.status_code, picture.headers["content-type"]) == (200, "image/png")
        page = await user.http_client.get(f"/files/{line.report}/page.html")
        assert page.headers["content-type"].startswith("text/plain")
        assert page.headers["x-content-type-options"] == "nosniff"
        for path in ("secret.txt", MANIFEST, "../../../tags/base@latest.json", "%2e%2e/x"):
            assert (await user.http_client.get(f"/files/{line.report}/{path}")).status_code == 404

    visit(line.store, steps)


# ---- in a browser


@pytest.fixture
def address(line: Any) -> Iterator[str]:
    """The explorer as a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "dashboards.app", "--store", line.store.root, "--port", str(port)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}  # NiceGUI looks for it
    process = subprocess.Popen(command, env=env)
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
            break
        except (urllib.error.URLError, ConnectionError):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(20)


@pytest.mark.browser
def test_a_browser_goes_from_the_listing_to_an_artifact_its_lineage_and_back_with_no_request_outside(
    address: str, line: Any
) -> None:
    from playwright.sync_api import expect, sync_playwright

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium, "install chromium, or set CHROMIUM to a browser"
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        requests: list[str] = []
        problems: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        page.get_by_placeholder("Search id, tag, summary").fill("base@latest")
        expect(page.get_by_text("1 of 4")).to_be_visible()
        page.locator("tbody tr").first.click()
        expect(page).to_have_url(f"{address}/artifact/{line.base}")
        expect(page.locator("canvas").first).to_be_visible()  # the loss chart
        page.get_by_role("button", name="Lineage").click()
        expect(page.locator(".lineage .node")).to_have_count(3)
        page.locator(".lineage .node", has_text="evaluate").click()
        expect(page).to_have_url(f"{address}/artifact/{line.report}")
        picture = page.locator(".nicegui-markdown img")
        expect(picture).to_be_visible()
        assert picture.evaluate("image => image.naturalWidth") == 30
        page.go_back()
        expect(page.locator(".lineage")).to_be_visible()
        browser.close()
    assert problems == []
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []
