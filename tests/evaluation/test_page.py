"""The page writer: what a browser would read, that strings stay strings, and that nothing is asked of the network."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from cosmos_ssl.evaluation.page import Page

EVIL = """<img src="http://x/y.png" onerror=alert(1)>'"&amp;</script>"""


class Reader(HTMLParser):
    """Elements in order with their attributes, and the text of each."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append((self.elements[-1][0] if self.elements else "", data))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def said(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag and text.strip()]


def picture(height: int = 20, width: int = 30) -> torch.Tensor:
    return torch.stack([torch.full((height, width), level, dtype=torch.uint8) for level in (200, 40, 90)])


def decoded(source: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2])))


@pytest.fixture
def full() -> Page:
    """A page with one of everything, and every string a trap."""
    page = Page(EVIL, EVIL).text(EVIL).section(EVIL).text(EVIL).figure(picture(), EVIL).words([(EVIL, 0.5)], EVIL)
    return page.section("two").table([[EVIL, "n"], [EVIL, 1.5]], EVIL).legend([((1, 2, 3), EVIL)])


def test_strings_stay_strings(full: Page) -> None:
    read = Reader(full.html())
    assert len(read.of("img")) == 1 and len(read.of("script")) == 1
    assert not [name for _, attributes in read.elements for name in attributes if name.startswith("on")]
    assert read.of("img")[0]["alt"] == EVIL
    for tag in ("title", "h1", "h2", "p", "figcaption", "span", "th", "td", "caption", "option", "i"):
        assert any(EVIL in text for text in read.said(tag)), tag


def test_nothing_is_asked_of_the_network(full: Page) -> None:
    text = full.html()
    read = Reader(text)
    links = [
        value
        for _, attributes in read.elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action")
    ]
    assert [link for link in links if not (link or "").startswith("data:image/")] == []
    assert not read.of("link") and "url(" not in text and "@import" not in text
    own = re.sub(r"base64,[^\"]*", "", Page("plain").section("a").text("b").figure(picture()).html())
    assert not re.search(r"https?:|//[a-z]|fetch\(|XMLHttp", own)


def test_only_its_own_script_may_run(full: Page) -> None:
    read = Reader(full.html())
    (script,) = read.said("script")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [meta["content"] or "" for meta in read.of("meta") if "http-equiv" in meta]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"


def test_sections_are_numbered_and_what_stands_before_them_is_above(full: Page) -> None:
    text = full.html()
    read = Reader(text)
    assert [section["id"] for section in read.of("section")] == ["s1", "s2"]
    assert [option["value"] for option in read.of("option")] == ["1", "2"]
    assert text.index("<p>") < text.index("</header>") < text.index("<section")
    assert "prefers-color-scheme:dark" in text


def test_tensors_become_pictures() -> None:
    read = Reader(Page("x").figure(picture(20, 30)).figure(picture(10, 40)).html())
    first, second = read.of("img")
    assert (first["width"], first["height"]) == ("30", "20")
    shown = decoded(first["src"] or "")
    assert shown.size == (30, 20)
    assert all(
        abs(is_there - wanted) < 6
        for is_there, wanted in zip(shown.convert("RGB").getpixel((15, 10)), (200, 40, 90), strict=True)
    )
    assert [figure.get("class") for figure in read.of("figure")] == [None, "wide"]
    assert second["width"] == "40"
    assert decoded(Reader(Page("x").figure(picture(2, 20_000)).html()).of("img")[0]["src"] or "").size == (20_000, 2), (
        "no WebP is so long"
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_encoded_pictures_pass_as_they_are(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    Image.new("RGB", (5, 4), "red").save(path, kind)
    for given in (path, path.read_bytes()):
        source = Reader(Page("x").figure(given).html()).of("img")[0]["src"]
        assert source == f"data:image/{kind.lower()};base64,{base64.b64encode(path.read_bytes()).decode()}"


def test_what_is_no_picture() -> None:
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
    for given in (b"nothing", svg):
        with pytest.raises(ValueError, match="must be one of PNG, JPEG, WEBP, GIF"):
            Page("x").figure(given)


def test_words_and_numbers() -> None:
    read = Reader(Page("x").words([("a", 0.25), ("b", 1)]).table([("name", "R@1"), ("coco", 53.1), (None, 7)]).html())
    assert [span["style"] for span in read.of("span")] == ["--w:0.250", "--w:1.000"]
    assert [(cell.get("class"), text) for cell, text in zip(read.of("td"), read.said("td"), strict=True)] == [
        (None, "coco"),
        ("number", "53.1"),
        (None, "None"),
        ("number", "7"),
    ]


def test_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    page = Page("a key that is no UTF-8: \udcff")
    page.write(path)
    page.section("more").write(path)
    assert "more" in path.read_text("utf-8") and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        page.write(tmp_path / "no" / "page.html")
