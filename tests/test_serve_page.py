"""The page of `mmclip serve` in a real browser: the system's Chromium, driven by Playwright."""

import base64
import csv
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

import mmclip
from mmclip.data.images import read_image
from tests.commands import Running, start
from tests.made_files import dicom, encoded, ramp

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt install chromium)"),
]

FINDING = "pleural effusion"
TOKEN = "a-token-of-some-length"
expect.set_options(timeout=30_000)


def served(process: Running) -> str:
    """The address that a server prints."""
    for _ in range(1200):
        said = process.log.with_suffix(".out").read_text() if process.process.is_alive() else ""
        if said.startswith("http"):
            return said.strip()
        if process.process.exitcode is not None:
            break
        time.sleep(0.1)
    raise AssertionError(process.log.with_suffix(".err").read_text())


@pytest.fixture(scope="module")
def url(
    made_run: Path, made_data: Path, made_results: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A server of the command, with an index and validation scores."""
    log = tmp_path_factory.mktemp("serve") / "log"
    log.with_suffix(".out").touch()
    process = start(
        log, "serve", "--model", made_run, "--index", made_data, "--reference", made_results,
        "--port", "0", "--cpu",
    )  # fmt: skip
    yield served(process)
    process.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Opened:
    """A page, and all that it asked for and complained of."""

    def __init__(self, browser: Browser, url: str, is_ready: bool = True, **context) -> None:
        given = {"viewport": {"width": 1280, "height": 860}, **context}
        self.context = browser.new_context(**given)
        self.page = self.context.new_page()
        self.asked: list[str] = []
        self.faults: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.goto(url)
        if is_ready:
            self.page.wait_for_selector("body[data-ready]")

    def give(self, *files: Path) -> Page:
        """Chooses files and waits for their scores."""
        self.page.set_input_files("#file", list(files))
        settle(self.page)
        return self.page


@pytest.fixture
def opened(browser: Browser, url: str) -> Iterator[Opened]:
    found = Opened(browser, url)
    yield found
    assert not found.faults
    assert all(address.startswith((url, "blob:", "data:")) for address in found.asked)
    found.context.close()


@pytest.fixture
def files(made_raw: Path) -> list[Path]:
    return sorted((made_raw / "images").iterdir())[:3]


def settle(page: Page) -> None:
    """Waits until nothing is under way."""
    expect(page.locator("#status:not(.busy)")).to_be_visible()
    page.wait_for_timeout(150)
    expect(page.locator("#status:not(.busy)")).to_be_visible()


def value(page: Page, finding: str = FINDING) -> str:
    return page.locator(f'[data-finding="{finding}"] .value').inner_text()


def test_a_dropped_image_is_scored_with_the_numbers_of_python(
    opened: Opened, files: list[Path], made_run: Path
):
    page = opened.page
    content = base64.b64encode(files[0].read_bytes()).decode()
    handle = page.evaluate_handle(
        """([content, name]) => {
          const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
          const transfer = new DataTransfer();
          transfer.items.add(new File([bytes], name, { type: "image/png" }));
          return transfer;
        }""",
        [content, files[0].name],
    )
    page.dispatch_event("#stage", "dragenter", {"dataTransfer": handle})
    page.dispatch_event("#stage", "drop", {"dataTransfer": handle})
    expect(page.locator("#stage.loaded")).to_be_visible()
    settle(page)
    expected = mmclip.load(made_run).classify([str(files[0])], FINDING).probabilities[0, 0]
    assert value(page) == f"{expected:.3f}"
    assert page.locator("#radiograph").evaluate("(image) => image.naturalWidth") == 32
    row = page.locator(f'[data-finding="{FINDING}"]')
    assert "higher than" in row.inner_text() and "in reports" in row.inner_text()
    assert "probability" in (row.locator("svg").get_attribute("aria-label") or "")
    assert "not a medical device" in page.locator("#caution").inner_text()
    assert "knows next to nothing" in page.locator("#caution").inner_text()


def test_typed_findings_are_scored_and_other_images_have_other_scores(
    opened: Opened, files: list[Path]
):
    page = opened.give(*files)
    page.fill("#finding", "small left nodule")
    page.press("#finding", "Enter")
    settle(page)
    seen = set()
    for number in range(3):
        page.locator(".thumb").nth(number).click()
        settle(page)
        seen.add((value(page), value(page, "small left nodule")))
    assert len(seen) == 3
    page.select_option("#prompts", "sentence")
    settle(page)
    assert (value(page), value(page, "small left nodule")) not in seen
    assert "--prompts sentence" in page.locator("#commands").inner_text()
    page.fill("#finding", "SMALL LEFT NODULE")
    page.press("#finding", "Enter")
    assert page.locator('[data-finding$="nodule" i]').count() == 1  # asked for once
    page.select_option("#order", "probability")
    shown = [float(text.strip("<> ")) for text in page.locator(".finding .value").all_inner_texts()]
    assert shown == sorted(shown, reverse=True)


def test_a_map_lies_over_the_image_and_its_strength_changes(opened: Opened, tmp_path: Path):
    path = tmp_path / "wide.png"
    path.write_bytes(encoded(ramp(60, 120)))
    page = opened.give(path)
    page.click(f'[data-map="{FINDING}"]')
    expect(page.locator("#overlay[src]")).to_be_visible()
    settle(page)
    overlay = page.locator("#overlay")
    assert overlay.evaluate("(o) => [o.naturalWidth, o.naturalHeight]") == [120, 60]
    assert overlay.bounding_box() == page.locator("#radiograph").bounding_box()
    page.locator("#opacity").fill("30")
    assert float(overlay.evaluate("(o) => getComputedStyle(o).opacity")) == pytest.approx(0.3)
    assert f"--phrase '{FINDING}'" in page.locator("#commands").inner_text()
    page.focus("#stage")
    page.keyboard.press("m")
    expect(overlay).to_be_hidden()


def test_the_pointer_zooms_where_it_is_and_the_image_cannot_be_lost(
    opened: Opened, files: list[Path]
):
    page = opened.give(files[0])
    stage = page.locator("#stage").bounding_box()
    assert stage is not None
    before = page.locator("#radiograph").bounding_box()
    x, y = before["x"] + before["width"] / 4, before["y"] + before["height"] / 4
    page.mouse.move(x, y)
    page.mouse.wheel(0, -400)
    after = page.locator("#radiograph").bounding_box()
    assert after["width"] > 2 * before["width"]
    assert (x - after["x"]) / after["width"] == pytest.approx(0.25, abs=0.01)
    page.mouse.down()
    page.mouse.move(x + 3000, y + 3000, steps=3)
    page.mouse.up()
    moved = page.locator("#radiograph").bounding_box()
    assert moved["x"] <= stage["x"] + 1 and moved["y"] <= stage["y"] + 1
    page.click("#zoom-fit")
    assert page.locator("#radiograph").bounding_box() == before


def test_the_nearest_studies_come_with_their_reports_as_text(opened: Opened, files: list[Path]):
    page = opened.give(files[0])
    page.click("#seek-image")
    expect(page.locator("#found li")).to_have_count(6)
    assert files[0].stem not in page.locator("#found").inner_text()
    assert any(len(text) > 20 for text in page.locator("#found .report").all_inner_texts())
    page.fill("#phrase", "pneumothorax")
    page.press("#phrase", "Enter")
    settle(page)
    assert "pneumothorax" in page.locator("#near-note").inner_text()
    assert "mmclip retrieve" in page.locator("#commands").inner_text()


def test_the_window_of_dicom_changes_what_is_shown_and_no_score(opened: Opened, tmp_path: Path):
    path = tmp_path / "a.dcm"
    values = np.add.outer(np.arange(60), np.arange(80)).astype(np.uint16) * 20
    path.write_bytes(dicom(values, WindowCenter=1400, WindowWidth=2000))
    page = opened.give(path)
    expect(page.locator("#level")).to_be_enabled()
    assert page.input_value("#level") == "1400" and page.input_value("#width") == "2000"
    score = value(page)

    def grey() -> int:
        return page.evaluate(
            """() => {
              const canvas = document.getElementById("windowed");
              return canvas.getContext("2d").getImageData(40, 30, 1, 1).data[0];
            }"""
        )

    page.locator("#level").fill("1600")
    expect(page.locator("#windowed")).to_be_visible()
    dark = grey()
    page.locator("#level").fill("900")
    assert grey() > dark
    # The window of the file itself gives the file's own picture.
    page.locator("#level").fill("1400")
    filed = read_image(path)[30, 40]
    assert abs(grey() - int(filed)) <= 1
    page.click("#window-reset")
    expect(page.locator("#windowed")).to_be_hidden()
    assert value(page) == score
    other = tmp_path / "b.png"
    other.write_bytes(encoded(ramp()))
    opened.give(other)
    expect(page.locator("#level")).to_be_disabled()


def test_a_bad_file_is_told_by_name_and_the_others_are_scored(
    opened: Opened, files: list[Path], tmp_path: Path
):
    bad = tmp_path / "<img src=x onerror=alert(1)>.png"
    bad.write_bytes(b"no image")
    page = opened.give(bad)
    assert bad.name in page.locator("#status").inner_text()
    assert "bad" in (page.locator("#status").get_attribute("class") or "")
    opened.give(files[0])
    assert re.fullmatch(r"[<>]?\s?\d\.\d{3}", value(page))
    assert page.locator(".thumb").count() == 2
    assert page.locator("img[src='x']").count() == 0
    page.fill("#finding", "\u4e2d\u6587")  # words that the model cannot read
    page.press("#finding", "Enter")
    expect(page.locator("#findings-note")).to_contain_text("\u4e2d\u6587")
    assert page.locator('[data-finding="\u4e2d\u6587"]').count() == 0
    page.fill("#finding", "small effusion")
    page.press("#finding", "Enter")
    settle(page)
    assert value(page, "small effusion") != "–"


def test_downloads_hold_the_numbers_and_the_view(
    opened: Opened, files: list[Path], made_run: Path, tmp_path: Path
):
    page = opened.give(*files[:2])
    with page.expect_download() as table:
        page.click("#save-csv")
    table.value.save_as(tmp_path / "p.csv")
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    expected = mmclip.load(made_run).classify([str(f) for f in files[:2]], FINDING).probabilities
    assert [row["image_id"] for row in rows] == [f.name for f in files[:2]]
    assert [float(row[FINDING]) for row in rows] == expected[:, 0].tolist()
    page.click(f'[data-map="{FINDING}"]')
    settle(page)
    with page.expect_download() as picture:
        page.click("#save-png")
    picture.value.save_as(tmp_path / "view.png")
    saved = Image.open(tmp_path / "view.png").convert("RGB")
    assert saved.width >= 640
    red, _, blue = np.asarray(saved, int).transpose(2, 0, 1)
    assert (red - blue > 60).mean() > 0.02  # the map's amber


COLOURS = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const luminance = ([r, g, b]) => {
    const part = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const colour = parse(getComputedStyle(node).backgroundColor);
      if (colour.length === 3 || colour[3] > 0.5) return colour;
    }
    return [255, 255, 255];
  };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    const box = node.getBoundingClientRect();
    const text = walker.currentNode.data.trim().slice(0, 40);
    if (!text || box.width < 2 || node.closest(":disabled, .hidden, script")) continue;
    const both = [parse(getComputedStyle(node).color), ground(node)].map(luminance);
    const ratio = (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
    if (ratio < 4.5) poor.push(`${text} ${ratio.toFixed(2)}`);
  }
  return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_the_contrast_of_wcag_aa(
    browser: Browser, url: str, files: list[Path], scheme: str
):
    opened = Opened(browser, url, color_scheme=scheme)
    assert not opened.page.evaluate(COLOURS)
    page = opened.give(*files[:2])
    page.click(f'[data-map="{FINDING}"]')
    page.click("#seek-image")
    expect(page.locator("#found li")).to_have_count(6)
    settle(page)
    assert not page.evaluate(COLOURS)
    luminance = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", luminance)[0]) < 60) == (scheme == "dark")
    opened.context.close()


def test_the_colours_can_be_chosen_and_stay_chosen(browser: Browser, url: str):
    opened = Opened(browser, url, color_scheme="light")
    page = opened.page
    for _ in range(2):  # auto, light, dark
        page.click("#theme")
    ground = "() => getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(ground) == "rgb(15, 20, 24)"
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.evaluate(ground) == "rgb(15, 20, 24)"
    opened.context.close()


def test_a_phone_shows_all_of_it_without_scrolling_sideways(
    browser: Browser, url: str, files: list[Path]
):
    opened = Opened(
        browser, url, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True
    )
    page = opened.give(*files)
    page.tap(f'[data-map="{FINDING}"]')
    expect(page.locator("#overlay[src]")).to_be_visible()
    page.tap("#seek-image")
    expect(page.locator("#found li")).to_have_count(6)
    settle(page)
    assert page.evaluate("() => document.documentElement.scrollWidth") == 390
    for button in page.locator("button:visible").all():
        box = button.bounding_box()
        assert box is not None and box["height"] >= 28 and box["x"] + box["width"] <= 390
    opened.context.close()


def test_nothing_jumps_while_answers_come(opened: Opened, files: list[Path]):
    page = opened.page
    page.evaluate(
        """() => {
          window.shifts = [];
          new PerformanceObserver((list) => {
            for (const entry of list.getEntries()) window.shifts.push(entry.value);
          }).observe({ type: "layout-shift", buffered: true });
        }"""
    )
    opened.give(*files)
    page.wait_for_timeout(700)  # shifts right after an input are not counted
    page.evaluate("() => document.querySelector('[data-map]').click()")
    settle(page)
    page.wait_for_timeout(300)
    assert sum(page.evaluate("() => window.shifts")) < 0.02


def test_the_keyboard_alone_reaches_everything_and_its_focus_is_seen(
    opened: Opened, files: list[Path]
):
    page = opened.give(files[0])
    reached: list[str] = []
    page.evaluate("() => document.activeElement.blur()")
    for _ in range(120):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => {
              const node = document.activeElement;
              const label = document.getElementById("more");
              const style = getComputedStyle(node.id === "file" ? label : node);
              const isSeen = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
              const name = node.id || node.dataset.map || node.className || node.tagName;
              return [name, isSeen];
            }"""
        )
        if name == "BODY":
            break
        reached.append(name)
        assert outline, name
    needed = {
        "stage", "file", "zoom-in", "zoom-out", "zoom-fit", "opacity", "save-png", "theme",
        "finding", "lists", "prompts", "order", "clear", "save-csv", "phrase", "seek-image",
        FINDING,
    }  # fmt: skip
    assert needed <= set(reached)
    page.focus("#finding")
    page.keyboard.type("cardiomegaly with effusion")
    page.keyboard.press("Enter")
    settle(page)
    assert value(page, "cardiomegaly with effusion") != "–"
    page.focus(f'[data-map="{FINDING}"]')
    page.keyboard.press("Space")
    expect(page.locator("#overlay[src]")).to_be_visible()
    assert page.evaluate("() => document.activeElement.dataset.map") == FINDING  # it stays there
    page.focus("#stage")
    before = page.locator("#radiograph").bounding_box()["width"]
    page.keyboard.press("+")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#radiograph").bounding_box()["width"] == pytest.approx(1.25 * before)
    page.keyboard.press("0")
    assert page.locator("#radiograph").bounding_box()["width"] == pytest.approx(before)


def test_every_control_has_a_name_for_screen_readers(opened: Opened, files: list[Path]):
    page = opened.give(*files)
    nameless = page.evaluate(
        """() => {
          const kinds = "button, input, select, [tabindex='0'], svg[role=img]";
          const name = (node) => node.getAttribute("aria-label") || node.textContent.trim()
            || node.labels?.[0]?.textContent.trim();
          return [...document.querySelectorAll(kinds)]
            .filter((node) => node.getClientRects().length && !name(node))
            .map((node) => node.outerHTML);
        }"""
    )
    assert not nameless
    assert page.locator("h1").count() == 1 and page.locator("main").count() == 1
    assert page.locator("#status[role=status]").count() == 1


def test_a_token_is_asked_for_and_a_wrong_one_is_asked_again(
    browser: Browser, made_run: Path, tmp_path: Path
):
    log = tmp_path / "log"
    log.with_suffix(".out").touch()
    process = start(log, "serve", "--model", made_run, "--token", TOKEN, "--port", "0", "--cpu")
    try:
        opened = Opened(browser, served(process), is_ready=False)
        page = opened.page
        for token in ("wrong", TOKEN):
            expect(page.locator("#token-dialog")).to_be_visible()
            page.fill("#token", token)
            page.press("#token", "Enter")
        page.wait_for_selector("body[data-ready]")
        assert TOKEN not in page.content() and not [a for a in opened.asked if TOKEN in a]
        opened.context.close()
    finally:
        process.kill()
