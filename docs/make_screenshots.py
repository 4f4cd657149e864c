"""Makes the pictures of the UI in docs/images, from a running `dagster dev`.

The home behind it has run pep8_alt_lmu with its null control (`textalign run pep8_alt_lmu`). Needs
playwright and a Chromium: `pip install playwright`, `apt-get install chromium`. Then:

    python docs/make_screenshots.py http://localhost:3000 [folder]
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

IMAGES = Path(__file__).parent / "images"
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
SIZE = {"width": 1400, "height": 900}
EXPERIMENT = "pep8_alt_lmu"


def main(url: str, folder: Path) -> None:
    """Writes ui_assets.png, ui_evaluation_plots.png and ui_samples.png to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=FLAGS.split())
        for name, show in (("assets", assets), ("evaluation_plots", plots), ("samples", samples)):
            page = browser.new_page(viewport=SIZE)
            show(page, url)
            page.wait_for_load_state("networkidle")
            page.wait_for_timeout(1500)  # fonts, and the charts' animation
            page.screenshot(path=folder / f"ui_{name}.png")
            page.close()
        browser.close()


def assets(page: Page, url: str) -> None:
    """The seven assets, each with the state of its grid."""
    page.set_viewport_size({"width": 1900, "height": 620})
    page.goto(f"{url}/locations/textalign/asset-groups/loop")
    page.get_by_text("evaluation", exact=True).first.wait_for()
    page.get_by_text("Hide navigation").click()
    page.reload()
    page.get_by_text("6 partitions").or_(page.get_by_text("All")).first.wait_for()


def plots(page: Page, url: str) -> None:
    """A plot per figure, experiments side by side."""
    page.goto(f"{url}/assets/evaluation?view=overview")
    page.get_by_role("button", name="Plots").click()
    first = page.get_by_text("perplexity under the base policy", exact=True)
    first.wait_for()
    first.evaluate("title => title.scrollIntoView({block: 'start'})")


def samples(page: Page, url: str) -> None:
    """Samples of the first iteration with what the linter said of them."""
    page.set_viewport_size({"width": 1400, "height": 1000})
    page.goto(f"{url}/assets/feedback?view=partitions&partition={EXPERIMENT}%7C001")
    page.locator("tr", has_text="examples").get_by_text("[Show Markdown]").click()
    page.get_by_role("dialog").locator("pre").first.wait_for()
    page.get_by_role("dialog").evaluate("dialog => dialog.parentElement.scrollTo(0, 0)")
    page.get_by_role("dialog").get_by_text("examples").scroll_into_view_if_needed()


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"), Path(sys.argv[2]) if len(sys.argv) > 2 else IMAGES)
