"""The served page in a real browser: words, more like this, pictures, threshold, attention, keyboard, narrow, dark."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cosmos_ssl.search.index import Entry
from cosmos_ssl.search.searcher import Searcher
from cosmos_ssl.search.server import Server

pytestmark = pytest.mark.browser


@pytest.fixture
def page(browser: Any, server: Server) -> Any:
    """The page, loaded, in the browser."""
    browser.get(server.address)
    until(browser, lambda: "24 pictures of scenes" in text(browser, "#about"))
    return browser


def until(browser: Any, what: Callable[[], Any]) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 20, poll_frequency=0.02).until(lambda _: what())


def one(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def text(browser: Any, selector: str) -> str:
    return str(one(browser, selector).text)


def captions(browser: Any) -> list[str]:
    """Those of the hits that are shown, read at once."""
    shown = "[...document.querySelectorAll('#hits li .caption')].filter(one => one.checkVisibility())"
    return list(browser.execute_script(f"return {shown}.map(one => one.textContent)"))


def expected(searcher: Searcher, words: str) -> list[str]:
    hits = searcher.nearest(searcher.words_vector(words), 12)
    return [searcher.index.entry(hit.row).caption or "" for hit in hits]


def search(browser: Any, words: str) -> None:
    field = one(browser, "#words")
    field.clear()
    field.send_keys(words + "\n")
    until(browser, lambda: f"nearest to “{words}”" in text(browser, "#status"))


def test_words_more_and_pictures(page: Any, searcher: Searcher, tmp_path: Path) -> None:
    search(page, "a red circle")
    assert captions(page) == expected(searcher, "a red circle")
    until(page, lambda: page.execute_script("return document.querySelector('#hits img').naturalWidth") == 64)
    first = searcher.nearest(searcher.words_vector("a red circle"), 12)[0].row
    page.find_elements("css selector", "#hits li .told button")[0].click()
    like = [searcher.index.entry(hit.row).caption for hit in searcher.like(first, 12)]
    until(page, lambda: captions(page) == like)
    searcher.index.picture(5, "white").save(tmp_path / "asked.png")
    one(page, "#file").send_keys(str(tmp_path / "asked.png"))
    until(page, lambda: "nearest to asked.png" in text(page, "#status"))
    assert captions(page)[0] == searcher.index.entry(5).caption
    told = searcher.texts(searcher.vector_of(5), 8)
    assert [found.text for found in page.find_elements("css selector", "#asked-texts li span:last-child")] == [
        said for said, _ in told
    ]
    slider = one(page, "#least")
    page.execute_script(
        "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))",
        slider,
        searcher.nearest(searcher.vector_of(5), 12)[3].score - 1e-6,
    )
    assert len(captions(page)) == 4 and text(page, "#least-told").endswith("4 of 12")
    drop = """
    const bytes = Uint8Array.from(atob(arguments[0]), c => c.charCodeAt(0)), data = new DataTransfer();
    data.items.add(new File([bytes], 'dropped.png', {type: 'image/png'}));
    dispatchEvent(new DragEvent('drop', {dataTransfer: data, cancelable: true}));
    """
    page.execute_script(drop, base64.b64encode((tmp_path / "asked.png").read_bytes()).decode())
    until(page, lambda: "nearest to dropped.png" in text(page, "#status"))


def test_attention_by_keyboard_alone(page: Any, searcher: Searcher) -> None:
    """From the first key to the words that look at a hit and back, by Tab, Enter and Escape; focus is always seen."""
    from selenium.webdriver import ActionChains, Keys

    def press(*keys: str) -> None:
        ActionChains(page).send_keys(*keys).perform()

    def name() -> str:
        return str(page.execute_script("return document.activeElement.id || document.activeElement.className"))

    def tab_to(wanted: str) -> None:
        for _ in range(12):
            if name() == wanted:
                break
            press(Keys.TAB)
        assert name() == wanted
        assert page.execute_script("return getComputedStyle(document.activeElement).outlineStyle") != "none"

    assert name() == "words"
    press("a red circle", Keys.ENTER)
    until(page, lambda: captions(page) == expected(searcher, "a red circle"))
    least = page.execute_script("return document.getElementById('least').valueAsNumber")
    tab_to("least")
    press(Keys.ARROW_RIGHT)
    assert page.execute_script("return document.getElementById('least').valueAsNumber") >= least
    press(Keys.HOME)
    tab_to("open")
    press(Keys.ENTER)
    until(page, lambda: one(page, "#one").get_attribute("open") is not None)
    before = one(page, "#one-picture").get_attribute("src")
    tab_to("look-words")
    assert one(page, "#look-words").get_attribute("value") == "a red circle"
    press(Keys.ENTER)
    until(page, lambda: text(page, "#look-found") == "a red circle")
    assert one(page, "#one-picture").get_attribute("src") not in (before, None)
    row = searcher.nearest(searcher.words_vector("a red circle"), 12)[0].row
    weights = [float(span.get_attribute("title")) for span in page.find_elements("css selector", "#look-found span")]
    assert weights == pytest.approx([weight for _, weight in searcher.look(row, "a red circle").words], abs=0.006)
    until(page, lambda: len(page.find_elements("css selector", "#one-texts li")) == 8)
    press(Keys.ESCAPE)
    assert one(page, "#one").get_attribute("open") is None and name() == "open"


@pytest.mark.parametrize("dark", [False, True])
def test_narrow_light_and_dark(page: Any, dark: bool) -> None:
    """At 360 pixels nothing stands out to the side, and text can be told from its ground (WCAG 2.1, 4.5 to 1)."""
    scheme = {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        search(page, "a red circle")
        wide = "return [document.documentElement.scrollWidth, document.getElementById('one').scrollWidth]"
        assert page.execute_script(wide)[0] <= 360
        one(page, "#hits .open").click()
        assert page.execute_script(wide)[1] <= 360
        ground = luminance(page, "body", "backgroundColor")
        assert (ground < 0.1) == dark
        for selector in ("#about", ".caption", ".number", "#status"):
            light, low = sorted((luminance(page, selector, "color"), ground), reverse=True)
            assert (light + 0.05) / (low + 0.05) > 4.5, selector
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def luminance(browser: Any, selector: str, what: str) -> float:
    """Relative luminance of a colour, 0..1 (WCAG 2.1)."""
    script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    values = [int(part) / 255 for part in browser.execute_script(script, selector, what)[4:-1].split(",")[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_faults_are_told_and_captions_are_text(
    page: Any, searcher: Searcher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    evil = "<img src=x onerror=\"document.title='run'\"><b>bold</b>"
    monkeypatch.setattr(searcher.index, "entry", lambda row: Entry(key=evil, file=evil, caption=evil))
    search(page, "a red circle")
    assert set(captions(page)) == {evil} and page.title == "Search"
    one(page, "#hits .open").click()
    assert text(page, "#one-title") == evil and not page.find_elements("css selector", "b, #hits img[src=x]")
    one(page, "#close").click()
    (tmp_path / "none.png").write_bytes(b"none")
    one(page, "#file").send_keys(str(tmp_path / "none.png"))
    until(page, lambda: "This is no picture that can be searched by" in text(page, "#status"))
    errors = [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"]
    assert all("/picture" in entry["message"] and "400" in entry["message"] for entry in errors)
    Image.new("RGB", (30, 30), "red").save(tmp_path / "red.png")
    one(page, "#file").send_keys(str(tmp_path / "red.png"))
    until(page, lambda: "nearest to red.png" in text(page, "#status"))
