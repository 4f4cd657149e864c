"""The UI as a person uses it: the asset graph, launching by clicks, the figures and samples of the result."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from resources.store import ArtifactStore
from tests.integration.dev_server import DevServer, running

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"needs a browser: none of {', '.join(BROWSERS)}")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)
WAIT = 30_000  # milliseconds for the page to show something
STAGES = ["policy", "prompt_draws", "generations", "feedback", "datapool", "checkpoint", "evaluation"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevServer]:
    with running(tmp_path_factory.mktemp("ui"), ("toy",)) as started:
        yield started


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS.split())
        opened = browser.new_page(viewport={"width": 1400, "height": 1000})
        opened.set_default_timeout(WAIT)
        sync_api.expect.set_options(timeout=WAIT)
        yield opened
        browser.close()


def test_launch_by_clicking_and_read_the_result(server: DevServer, page: Any) -> None:
    expect = sync_api.expect
    page.goto(f"{server.url}/locations/textalign/asset-groups/loop")
    for stage in STAGES:
        expect(page.get_by_text(stage, exact=True).first).to_be_visible()

    page.get_by_role("button", name="Materialize all (6)").click()
    dialog = page.get_by_role("dialog")
    for choice in ("toy", "001"):
        dialog.get_by_text("Select a partition or create one").first.click()
        page.get_by_text(choice, exact=True).first.click()
        dialog.get_by_text("Launch runs to materialize").click()  # closes the list
    dialog.get_by_role("button", name="Launch 1 run").click()
    ended = ("SUCCESS", "FAILURE")
    server.until("end of the run", lambda: server.status("toy", "001") in ended)
    assert server.runs("toy")[0][:2] == ("001", "SUCCESS")

    # The figures of the partition match those in the store.
    page.goto(f"{server.url}/assets/evaluation?view=partitions&partition=toy%7C001")
    row = page.locator("tr", has_text="violations per 1,000 characters").first
    expect(row).to_be_visible()
    pointer = ArtifactStore(str(server.home / "state" / "store")).pointer("toy", 1, "evaluation")
    assert pointer is not None
    scores = pointer.artifact.frame("scores").filter(metric="violations", role="main")
    assert float(row.locator("td").nth(1).inner_text()) == pytest.approx(scores["value"][0], rel=1e-3)

    # A plot for every figure.
    page.goto(f"{server.url}/assets/evaluation?view=overview")
    page.get_by_role("button", name="Plots").click()
    expect(page.get_by_text("distinct-3", exact=True)).to_be_visible()
    expect(page.locator("canvas").first).to_be_visible()

    # Samples with their feedback, as they were written.
    page.goto(f"{server.url}/assets/feedback?view=partitions&partition=toy%7C001")
    page.locator("tr", has_text="examples").get_by_text("[Show Markdown]").click()
    block = page.get_by_role("dialog").locator("pre").first
    expect(block).to_be_visible()
    assert "\n    " in block.inner_text()
    expect(page.get_by_role("dialog").get_by_text("feedback:").first).to_be_visible()


def test_checks_and_columns_have_descriptions(server: DevServer, page: Any) -> None:
    expect = sync_api.expect
    page.goto(f"{server.url}/assets/generations?view=checks")
    for check in ("conditioned_once", "not_duplicated", "not_empty", "schema"):
        expect(page.get_by_text(check, exact=True).first).to_be_visible()
    expect(page.get_by_text("The condition precedes each prompt exactly once.")).to_be_visible()
    page.goto(f"{server.url}/assets/generations?view=overview")
    expect(page.get_by_text("One row per completion sampled from the policy.")).to_be_visible()
    expect(page.get_by_text("stop: ended by itself; length: cut off.")).to_be_visible()
