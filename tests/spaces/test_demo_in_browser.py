"""The demo in headless Chromium: upload, edit, mix, and where things stand on a desk and on a phone."""

import io
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


pytestmark = pytest.mark.slow
gradio = pytest.importorskip(
    "gradio", reason="needs gradio, which takes no pillow 13: make test-demo installs it apart"
)
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-demo installs it apart")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("needs Chromium on the PATH", allow_module_level=True)

SPACE = Path(__file__).resolve().parents[2] / "spaces" / "optvq"
TABS = ("Compare", "Codes", "Edit", "Mix")
OVERLAPS = """() => {
    const boxes = [...document.querySelectorAll(".block, .figures figure, .facts, [role=tab], h1, button.lg")]
        .filter(e => e.checkVisibility() && e.getBoundingClientRect().width > 0);
    const found = [];
    for (const a of boxes) for (const b of boxes) {
        if (a === b || a.contains(b) || b.contains(a)) continue;
        const p = a.getBoundingClientRect(), q = b.getBoundingClientRect();
        const width = Math.min(p.right, q.right) - Math.max(p.left, q.left);
        const height = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
        if (width > 1 && height > 1) found.push([a.outerHTML.slice(0, 80), b.outerHTML.slice(0, 80), width, height]);
    }
    return found;
}"""
CUT_OFF = """() => [...document.querySelectorAll("h1, p, img, figure, table, input, button, label, .block")]
    .filter(e => e.checkVisibility() && e.getBoundingClientRect().width > 0)
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1 || e.getBoundingClientRect().left < -1)
    .map(e => e.outerHTML.slice(0, 80))"""
WITHOUT_NAMES = """() => [
    ...[...document.querySelectorAll("#picture img, #comparison img, #canvas img, .figures img")].filter(e => !e.alt),
    ...[...document.querySelectorAll("button, input:not([type=file])")].filter(e => e.checkVisibility()
        && !(e.ariaLabel || e.textContent.trim() || e.title || e.labels?.length || e.querySelector("img[alt]:not([alt=''])"))),
].map(e => e.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def url():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        patch.syspath_prepend(SPACE)
        import app

        served = app.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
        yield served[1]
        gradio.close_all(verbose=False)
        for name in ("app", "picture_codes"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])


@pytest.fixture
def visit(browser, url, tmp_path):
    """visit(width, height) opens the page and waits for the first reconstruction. It asks no other server for anything."""
    pages, asked = [], []

    def start(width: int, height: int):
        page = browser.new_page(viewport={"width": width, "height": height})
        pages.append(page)
        page.set_default_timeout(60_000)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        page.wait_for_selector("#numbers table")
        page.wait_for_selector("#comparison img[alt='its reconstruction from codes']")
        return page

    yield start
    for page in pages:
        page.close()
    assert [address for address in asked if not address.startswith((url, "data:", "blob:"))] == []


def picture_of(page, selector: str) -> np.ndarray:
    """int (H, W, 3), from the image that the page shows."""
    body = page.request.get(page.get_attribute(selector, "src")).body()
    return np.asarray(Image.open(io.BytesIO(body)).convert("RGB"), int)


def wait_for_change(page, selector: str, attribute: str, before: str | None):
    changed = f"([selector, before]) => ![before, undefined].includes(document.querySelector(selector)?.{attribute})"
    page.wait_for_function(changed, arg=[selector, before])


def test_upload_edit_and_mix(visit, tmp_path):
    page = visit(1280, 800)
    for image in page.locator("#picture img, #comparison img").all():
        box = image.bounding_box()
        assert box["x"] >= 0 and box["y"] >= 0 and box["x"] + box["width"] <= 1280 and box["y"] + box["height"] <= 800
    assert page.evaluate("document.documentElement.scrollHeight") <= 800

    halves = Image.new("RGB", (60, 60), (200, 30, 30))
    halves.paste((30, 30, 200), (30, 0, 60, 60))
    halves.save(tmp_path / "halves.png")
    numbers = page.locator("#numbers p").first.inner_html()
    page.click("#picture button[aria-label='Remove Image']")
    page.set_input_files("#picture input[type=file]", tmp_path / "halves.png")
    wait_for_change(page, "#numbers p", "innerHTML", numbers)
    page.get_by_role("tab", name="Edit").click()
    before = picture_of(page, "#canvas img")
    assert (before[:, :200, 0] > 100).all() and (before[:, 312:, 0] < 100).all()

    source, box = page.get_attribute("#canvas img", "src"), page.locator("#canvas img").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 4.5 / 32, box["y"] + box["height"] / 2 + box["width"] * -7.5 / 32)
    wait_for_change(page, "#canvas img", "src", source)
    assert [page.locator(f"#{place} input[type=number]").input_value() for place in ("row", "column")] == ["8", "4"]
    page.wait_for_timeout(500)
    chosen, source = picture_of(page, "#canvas img"), page.get_attribute("#canvas img", "src")
    code = page.locator("#code input[type=number]")
    code.fill(str((int(code.input_value()) + 512) % 1024))
    code.press("Tab")
    page.click("#write")
    wait_for_change(page, "#canvas img", "src", source)
    changed = (picture_of(page, "#canvas img") != chosen).any(axis=2)
    assert changed[132:140, 68:76].any() and not changed[256:].any() and not changed[:, 256:].any()

    page.get_by_role("tab", name="Mix").click()
    page.click("#mix")
    page.wait_for_selector("#strip figure:nth-of-type(5)")
    assert page.evaluate(OVERLAPS) == [] and page.evaluate(WITHOUT_NAMES) == []
    assert page.evaluate("document.documentElement.scrollHeight") <= 800


def test_on_a_phone_nothing_is_cut_off(visit):
    page = visit(390, 844)
    for name in TABS:
        page.get_by_role("tab", name=name).click()
        if name == "Mix":
            page.click("#mix")
            page.wait_for_selector("#strip figure:nth-of-type(5)")
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.evaluate(CUT_OFF) == [] and page.evaluate(OVERLAPS) == [] and page.evaluate(WITHOUT_NAMES) == []


def test_an_example_takes_its_model_along(visit):
    page = visit(1280, 800)
    page.get_by_text("boot", exact=True).focus()
    page.get_by_text("boot", exact=True).click()
    page.wait_for_function("() => document.querySelector('#numbers')?.innerText.includes('8 x 8')")
    reconstruction = picture_of(page, "#comparison img >> nth=1")
    assert (reconstruction[:100, :100] < 30).all()  # black above the toe
