"""The page in a real headless browser: Debian's chromium, driven by playwright."""

import re
import shutil

import pytest

from tests.conftest import ROOT, scmdm

pytestmark = [pytest.mark.slow, pytest.mark.long]
PATIENCE_MS = 120_000


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'scmdm[browser]'")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        # The sandbox needs rights that root in a container lacks; the only page is our own.
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"], timeout=PATIENCE_MS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """Of a model that has learnt something, beside itself: one after a few steps is undecided everywhere alike."""
    model = ROOT / "configs/qm9/base-model"
    process = scmdm("demo", model, "--base", model, "--port", 0)
    try:
        url = process.stdout.readline().split()[0]
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(PATIENCE_MS)
        wrong = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(url)
        page.wait_for_selector(".panel")
        yield page
        assert wrong == []
    finally:
        process.terminate()
        process.communicate()


def test_a_colleague_watches_it_denoise(page, tmp_path):
    settings = page.locator("#settings")
    settings.locator("[name=steps]").fill("6")
    settings.locator("[name=prompt]").fill("CC")
    settings.locator("[name=kind]").select_option("confidence")
    settings.locator("#run").click()
    page.wait_for_function("document.querySelectorAll('.panel[data-done=true]').length === 2")  # it plays to its end
    assert page.locator("#where").inner_text().startswith("evaluation 6 of 6")
    assert page.locator(".panel").count() == 2 and page.locator(".cell.hidden:not(.scale)").count() == 0
    assert re.search(r"sampler.kind=confidence sampler.steps=6 .*prompt=CC", page.locator("#command").inner_text())

    page.locator("#at").fill("3")  # half way
    hidden = page.locator(".panel.adapted .cell.hidden")
    assert 0 < hidden.count() < 32 and page.locator(".panel.adapted .cell.new").count() > 0
    colours = {hidden.nth(i).evaluate("cell => cell.style.background") for i in range(hidden.count())}
    assert len(colours) > 1  # entropy differs from position to position
    assert page.locator(".panel.adapted .cell.given").count() == 3  # [BOS] and the prompt
    assert page.locator("#chart polyline").count() == 2
    screenshot = tmp_path / "page.png"
    page.screenshot(path=screenshot, full_page=True)
    assert screenshot.stat().st_size > 20_000


def test_a_mistake_is_shown_on_the_page(page):
    page.locator("[name=prompt]").fill("Xx")
    page.locator("#run").click()
    page.locator("#error").wait_for(state="visible")
    assert "vocabulary does not have it" in page.locator("#error").inner_text()
    page.locator("[name=prompt]").fill("")
    page.locator("#next").click()
    page.wait_for_function("document.querySelector('#error').hidden && !document.querySelector('#run').disabled")
    assert "seed=1" in page.locator("#command").inner_text()
