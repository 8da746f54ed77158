"""The form of a deployment in Prefect's UI, filled in by hand in a real browser."""

from __future__ import annotations

import json
import os
import shutil
import urllib.error
from pathlib import Path
from typing import Any

import pytest
from served import Served, served

from infra.store import ArtifactStore

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1200)]

PATIENCE = 120_000  # milliseconds: the server, the worker and the browser may share two cores
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]


@pytest.fixture
def chromium() -> str:
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    assert found, "install chromium, or set CHROMIUM to a browser"
    return found


def test_a_form_filled_in_by_hand_makes_what_the_command_line_makes(tmp_path: Path, chromium: str) -> None:
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE)
    with served(tmp_path) as up, sync_playwright() as playwright:
        deployment = up.deployments()["flows.stages.generate_problems"]
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1200, "height": 1600})
        page.set_default_timeout(PATIENCE)
        page.goto(f"{up.address}/v2/deployments/deployment/{deployment}/run")

        expect(page.get_by_text("What to compute. Every field is part of the artifact's identity.")).to_be_visible()
        expect(page.get_by_text("Empty: all that each family has")).to_be_visible()
        training, heldout = page.get_by_label("Training problems"), page.get_by_label("Held-out problems")
        expect(training).to_have_value("20000")  # the form opens with the config's defaults
        heldout.fill("6")
        page.get_by_label("Seed").fill("3")
        page.get_by_role("button", name="Remove en tag").click()
        expect(page.get_by_role("button", name="Remove zh tag")).to_be_visible()

        training.fill("0")
        page.get_by_role("button", name="Submit").click()
        assert training.evaluate("input => input.validationMessage") == "Value must be greater than or equal to 1."
        training.fill("30")
        page.get_by_role("button", name="Submit").click()
        page.get_by_role("button", name="View run").click()
        page.wait_for_url("**/runs/flow-run/**")
        run = page.url.partition("/flow-run/")[2].partition("?")[0]
        state = up.final_state(run)
        assert (state["type"], state["name"]) == ("COMPLETED", "Completed"), state
        expect(page.get_by_text("Completed").first).to_be_visible()
        browser.close()

        store = ArtifactStore(up.store)
        made = store.ids()
        assert len(made) == 1
        config = {"n_train": 30, "n_heldout": 6, "languages": ["zh"], "seed": 3}
        assert config.items() <= store.manifest(made[0]).config.items()
        assert store.manifest(made[0]).provenance.labels["flow_run"] == run
        settings = [f"--set={field}={json.dumps(value)}" for field, value in config.items()]
        assert "reused" in up.fathom("stage", "generate_problems", *settings)
        assert store.ids() == made

        for wrong, field in [({"n_train": 0}, "n_train"), ({"n_trane": 3}, "n_trane"), ({"languages": ["fr"]}, "fr")]:
            status, told = refused(up, deployment, wrong)
            assert (status, field in told) == (409, True), told
        assert len(up.post("flow_runs/filter", {})) == 2


def refused(up: Served, deployment: str, config: dict[str, Any]) -> tuple[int, str]:
    """Status and body of the answer to a run with this config."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        up.post(f"deployments/{deployment}/create_flow_run", {"parameters": {"config": config}})
    return caught.value.code, caught.value.read().decode()
