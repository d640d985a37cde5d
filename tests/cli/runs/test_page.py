"""The page of runs: what stands in it, that strings stay strings, that it asks nothing of the network, its size."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cosmos_ssl.cli.runs.gallery import Gallery
from cosmos_ssl.cli.runs.page import runs_page
from cosmos_ssl.cli.runs.reading import Reader

EVIL = "</script><img src=x onerror=alert(1)>'\"&"


class Page(HTMLParser):
    """Elements with their attributes, and the JSON of data blocks by id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.data: dict[str, Any] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.elements.append((f"/{tag}", {}))

    def handle_data(self, data: str) -> None:
        tag, attributes = self.elements[-1] if self.elements else ("", {})
        if tag == "script" and attributes.get("type") == "application/json":
            self.data[str(attributes["id"])] = json.loads(data)


@pytest.fixture
def hostile(tmp_path: Path, written: Callable[..., Path]) -> str:
    """The page of two runs in which every string is a trap."""
    place = tmp_path / "</script><b>"
    kind = "a<img src=x onerror=b>'"
    for name in ("one", "two"):
        written(
            place / f"{name}<i>&\"'",
            [{"step": 1, EVIL: 0.5, "loss": 1.0}],
            config={"key<b>": f"{EVIL}{name}"},
            log=[("WARNING", EVIL), ("INFO", f"the run ended: {EVIL}")],
            pictures={kind: [1]},
        )
    runs = [Reader().read(path, path.name) for path in sorted(place.glob("[ot]*"))]
    return runs_page(runs, [EVIL, "loss"], Gallery(), sort=EVIL, refresh=2)


def test_strings_stay_strings(hostile: str) -> None:
    page = Page(hostile)
    assert not [tag for tag, _ in page.elements if tag == "i"]
    assert [attributes for tag, attributes in page.elements if tag == "img"] == [{"alt": ""}], "the enlarged picture"
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert EVIL in page.data["data"]["metrics"] and page.data["data"]["runs"][0]["name"] == "one<i>&\"'"


def test_nothing_is_asked_of_the_network(hostile: str) -> None:
    page = Page(hostile)
    assert not [a for _, a in page.elements for name in ("src", "href", "action") if name in a]
    assert not re.search(r'(src|href)="https?://|@import|url\(', hostile)
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a) or ""
    assert policy.startswith("default-src 'none'; img-src data:;") and policy.count("'sha256-") == 2
    assert "The MIT License" in hostile and "Leon Sorokin" in hostile, "uPlot's licence goes with it"


def test_pictures_stay_within_their_bound(tmp_path: Path, written: Callable[..., Path]) -> None:
    steps = list(range(10, 210, 10))
    for name in "ab":
        written(tmp_path / name, pictures={"matches": steps, "attention": steps})
    (tmp_path / "a" / "pictures" / "step_00000200" / "matches.png").write_bytes(b"being writ")
    runs = [Reader().read(tmp_path / name, name) for name in "ab"]
    found, left_out = Gallery(budget=8 * 40_000).pictures(runs)
    shown = [set(by_step) for of_run in found for by_step in of_run.values()]
    assert all(10 in each and len(each) in (2, 1) for each in shown) and left_out == 80 - 7
    assert [max(of_run["attention"]) for of_run in found] == [200, 200]
    assert found[1]["matches"][200].startswith("data:image/webp;base64,")
    found, left_out = Gallery(budget=10).pictures(runs)
    assert not any(found) and left_out == 80
