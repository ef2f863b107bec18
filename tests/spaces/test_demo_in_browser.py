"""The demo in headless Chromium: upload, edit, mix, by mouse and by keyboard, on a desk and on a phone."""

import base64
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
REPOSITORY = Path(__file__).resolve().parents[2]
SPACE = REPOSITORY / "spaces" / "optvq"
OWN_MODEL = str(REPOSITORY / "model_cards" / "mnist")
TABS = ("Compare", "Codes", "Edit", "Mix")
OVERLAPS = """() => {
    const things = ".block, .figures figure, .comparison, .sides, .facts, [role=tab], h1, button.lg";
    const boxes = [...document.querySelectorAll(things)]
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

        served = app.launch(OWN_MODEL, prevent_thread_lock=True, quiet=True, ssr_mode=False)
        yield served[1]
        gradio.close_all(verbose=False)
        for name in ("app", "picture_codes"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        # playwright's own, which `playwright install chromium` fetches, or else that of the PATH
        own, names = Path(started.chromium.executable_path), ("chromium", "chromium-browser", "google-chrome")
        path = None if own.exists() else next(filter(None, map(shutil.which, names)), None)
        yield started.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])


@pytest.fixture
def visit(browser, url, capsys):
    """visit(width, height) opens the page and waits for the first reconstruction.

    The page asks no other server for anything, and nothing a visitor does leaves a stack trace in the server's log.
    """
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
    assert "Traceback" not in capsys.readouterr().err


def picture_of(page, selector: str) -> np.ndarray:
    """int (H, W, 3), from the image that the page shows."""
    source = page.locator(selector).first.get_attribute("src")
    is_data = source.startswith("data:")
    body = base64.b64decode(source.partition(",")[2]) if is_data else page.request.get(source).body()
    return np.asarray(Image.open(io.BytesIO(body)).convert("RGB"), int)


def eventually(page, condition):
    for _ in range(100):
        if condition():
            return
        page.wait_for_timeout(200)
    raise AssertionError("the page never came to it")


def is_framed(page, row: int, column: int) -> bool:
    """Whether the frame is around a token of 16 pixels."""
    canvas = picture_of(page, "#canvas img")
    return (canvas[row * 16, column * 16 : column * 16 + 16] == 255).all()


def wait_for_change(page, selector: str, attribute: str, before: str | None):
    changed = f"([selector, before]) => ![before, undefined].includes(document.querySelector(selector)?.{attribute})"
    page.wait_for_function(changed, arg=[selector, before])


def upload(page, path: Path):
    """Waits until the page shows what it gives."""
    before = page.get_attribute("#comparison img", "src")
    page.click("#picture button[aria-label='Remove Image']")
    page.set_input_files("#picture input[type=file]", path)
    wait_for_change(page, "#comparison img", "src", before)


def message_of(page) -> str:
    """The text of the message that comes up, which is then closed."""
    text = page.get_by_test_id("toast-body").first.inner_text()
    page.get_by_test_id("toast-close").first.click()
    return text


def write_another_code(page) -> int:
    """Writes a code into the chosen token, and waits for the picture that it makes."""
    source, code = page.get_attribute("#canvas img", "src"), page.locator("#code input[type=number]")
    written = (int(code.input_value()) + 512) % 1024
    code.fill(str(written))
    code.press("Tab")
    page.click("#write")
    wait_for_change(page, "#canvas img", "src", source)
    return written


def test_upload_edit_and_mix(visit, tmp_path):
    page = visit(1280, 800)
    for image in page.locator("#picture img, #comparison img").all():
        box = image.bounding_box()
        assert box["x"] >= 0 and box["y"] >= 0 and box["x"] + box["width"] <= 1280 and box["y"] + box["height"] <= 800
    assert page.evaluate("document.documentElement.scrollHeight") <= 800

    halves = Image.new("RGB", (60, 60), (200, 30, 30))
    halves.paste((30, 30, 200), (30, 0, 60, 60))
    halves.save(tmp_path / "halves.png")
    upload(page, tmp_path / "halves.png")
    page.get_by_role("tab", name="Edit").click()
    eventually(page, lambda: (picture_of(page, "#canvas img")[:, :200, 0] > 100).all())
    assert (picture_of(page, "#canvas img")[:, 312:, 0] < 100).all()

    box = page.locator("#canvas img").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 4.5 / 32, box["y"] + box["height"] / 2 + box["width"] * -7.5 / 32)
    eventually(page, lambda: is_framed(page, 8, 4))
    assert [page.locator(f"#{place} input[type=number]").input_value() for place in ("row", "column")] == ["8", "4"]
    chosen = picture_of(page, "#canvas img")
    write_another_code(page)
    changed = (picture_of(page, "#canvas img") != chosen).any(axis=2)
    assert changed[132:140, 68:76].any() and not changed[256:].any() and not changed[:, 256:].any()

    page.get_by_role("tab", name="Mix").click()
    page.click("#mix")
    page.wait_for_selector("#strip figure:nth-of-type(5)")
    assert page.evaluate(OVERLAPS) == [] and page.evaluate(WITHOUT_NAMES) == []
    assert page.evaluate("document.documentElement.scrollHeight") <= 800


def test_on_a_phone_nothing_is_cut_off(visit):
    page = visit(390, 844)
    box = page.locator(".comparison").bounding_box()
    assert box["width"] > 250 and box["y"] + box["height"] <= 844
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

    def reconstruction() -> np.ndarray:
        return picture_of(page, "#comparison img >> nth=1")

    eventually(page, lambda: (reconstruction()[:8, :8] < 30).all())  # black above the toe
    boot = reconstruction()
    page.locator("#model input").fill("digits")
    page.locator("#model input").press("Enter")
    eventually(page, lambda: (reconstruction() != boot).any())
    page.get_by_text("boot", exact=True).click()  # the same picture, but its model again
    eventually(page, lambda: (reconstruction() == boot).all())


def test_keyboard_alone_chooses_and_writes_a_token(visit):
    page = visit(1280, 800)
    page.get_by_role("tab", name="Edit").press("Enter")
    before = picture_of(page, "#canvas img")
    for place in ("row", "column"):
        page.locator(f"#{place} input[type=range]").press("ArrowRight")
        assert page.locator(f"#{place} input[type=number]").input_value() == "17"
    eventually(page, lambda: is_framed(page, 17, 17))
    framed = picture_of(page, "#canvas img")
    changed = np.argwhere((framed != before).any(axis=2))
    assert changed.min() >= 16 * 16 - 4 and changed.max() == 18 * 16 + 2  # the old frame is gone, the new one is drawn
    source = page.get_attribute("#canvas img", "src")
    page.locator("#code input[type=range]").press("End")
    page.locator("#write").press("Enter")
    wait_for_change(page, "#canvas img", "src", source)
    changed = (picture_of(page, "#canvas img") != framed).any(axis=2)
    assert changed[17 * 16 : 18 * 16, 17 * 16 : 18 * 16].any() and not changed[:128].any() and not changed[384:].any()


def test_keyboard_and_mouse_move_the_comparison(visit):
    page = visit(1280, 800)
    slider, box = page.locator("#comparison input"), page.locator("#comparison").bounding_box()

    def cut() -> str:
        return page.evaluate("getComputedStyle(document.querySelectorAll('#comparison img')[1]).clipPath")

    assert cut() == "inset(0px 0px 0px 50%)"
    slider.press("ArrowRight")
    assert cut() == "inset(0px 0px 0px 51%)" and slider.evaluate("e => e === document.activeElement")
    assert page.evaluate("getComputedStyle(document.querySelector('.comparison')).outlineStyle") == "solid"
    slider.press("Home")
    assert cut() == "inset(0px 0px 0px 0%)"
    box = page.locator(".comparison").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.8, box["y"] + 50)
    assert float(cut().split()[-1].rstrip("%)")) == pytest.approx(80, abs=2)


def test_a_number_beyond_the_last_row_is_the_last_row(visit):
    page = visit(1280, 800)
    page.get_by_role("tab", name="Edit").click()
    page.locator("#row input[type=number]").fill("500")
    eventually(page, lambda: is_framed(page, 31, 16))
    page.locator("#row input[type=number]").fill("")
    eventually(page, lambda: is_framed(page, 0, 16))
    assert page.get_by_test_id("toast-body").count() == 0


def two_halves(mode: str, left, right) -> Image.Image:
    picture = Image.new(mode, (64, 64), left)
    picture.paste(right, (32, 0, 64, 64))
    return picture


# What the file has on its left and right, and what the model gets: transparency is white, and 16 bits are scaled to 8.
@pytest.mark.parametrize(
    ("mode", "name", "left", "right", "shown"),
    (
        ("L", "gray.png", 60, 200, ((60,) * 3, (200,) * 3)),
        ("LA", "gray.png", (60, 255), (0, 0), ((60,) * 3, (255,) * 3)),
        ("RGBA", "colour.png", (200, 30, 60, 255), (0, 0, 0, 0), ((200, 30, 60), (255,) * 3)),
        ("I;16", "gray.png", 60 * 257, 200 * 257, ((60,) * 3, (200,) * 3)),
        ("P", "palette.png", 1, 2, ((200, 30, 60), (255,) * 3)),
        ("CMYK", "print.jpg", (0, 0, 0, 195), (0, 0, 0, 55), ((60,) * 3, (200,) * 3)),
    ),
)
def test_pictures_of_every_mode(visit, tmp_path, mode, name, left, right, shown):
    picture = two_halves(mode, left, right)
    if mode == "P":
        picture.putpalette([0, 0, 0, 200, 30, 60, 0, 0, 0])
    picture.save(tmp_path / name, **({"transparency": 2} if mode == "P" else {}))
    assert Image.open(tmp_path / name).mode == mode
    page = visit(1280, 800)
    upload(page, tmp_path / name)
    pixels = picture_of(page, "#comparison img")
    side = pixels.shape[0]
    for part, colour in zip((pixels[:, : side // 4], pixels[:, -side // 4 :]), shown, strict=True):
        assert np.abs(part - colour).max() <= 3


def test_a_file_that_is_no_picture(visit, tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    page = visit(1280, 800)
    page.click("#picture button[aria-label='Remove Image']")
    page.set_input_files("#picture input[type=file]", tmp_path / "bad.png")
    assert "cannot read image bad.png: not an image file" in message_of(page)


def test_edits_stay_with_another_assignment_and_their_end_is_said(visit):
    page = visit(1280, 800)
    page.get_by_role("tab", name="Edit").click()
    page.locator("#row input[type=range]").press("ArrowRight")
    eventually(page, lambda: is_framed(page, 17, 16))
    written = write_another_code(page)
    source = page.get_attribute("#canvas img", "src")
    page.get_by_label("sinkhorn", exact=True).check()
    wait_for_change(page, "#canvas img", "src", source)
    chosen = [page.locator(f"#{place} input[type=number]").input_value() for place in ("row", "column", "code")]
    assert chosen == ["17", "16", str(written)] and page.get_by_test_id("toast-body").count() == 0
    page.get_by_label("2", exact=True).check()
    assert "Your edits are undone" in message_of(page)
    assert page.locator("#row input[type=number]").input_value() == "8"


def test_models_are_those_of_the_list_and_of_the_hub(visit, url, monkeypatch):
    import app

    page = visit(1280, 800)
    field = page.locator("#model input")
    field.fill("/etc")
    field.press("Enter")
    assert "choose a model of the list, or write a Hub id" in message_of(page)
    field.fill(OWN_MODEL)  # given to launch
    field.press("Enter")
    page.wait_for_function("() => document.querySelector('#numbers').innerText.includes('32 x 32')")

    monkeypatch.chdir(REPOSITORY)
    for name in ("", "/", "..", "../optvq", "spaces/optvq", "bert", "a/b/c", "https://example.org/model"):
        with pytest.raises(gradio.Error, match="choose a model of the list"):
            app.source_of(name)
    assert app.source_of("owner/name") == "owner/name"
    assert Path(app.source_of("digits")) == Path(OWN_MODEL)
