"""What the served page may ask: a table of routes over a searcher. Pictures go by the number of their row alone."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

from cosmos_ssl.api import BadSample, UserError
from cosmos_ssl.pictures import open_rgb
from cosmos_ssl.search.hits import THUMBNAIL, thumbnail, webp
from cosmos_ssl.search.nearest import Vectors
from cosmos_ssl.search.searcher import Hit, Searcher

if TYPE_CHECKING:
    from PIL import Image

WORDS_BYTES = 1 << 16
"""The most that a question in words may have."""
PICTURE_BYTES = 1 << 25
"""The most that a picture that is asked for may have."""
_WORDS_LETTERS = 2000
_LARGE = 1024  # pixels of a picture that is looked at by itself
_TEXTS = 8  # that are told of a picture
_KEPT = 2048  # pictures as they were last sent
_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}


class Refused(Exception):
    """A request that is answered by a sentence and a status."""

    def __init__(self, status: int, sentence: str) -> None:
        self.status = status
        super().__init__(sentence)


class Reply(NamedTuple):
    """What is sent."""

    kind: str
    body: bytes


class Route(NamedTuple):
    """A request that is answered: by its method and the pattern of its path."""

    method: str
    path: re.Pattern[str]
    most: int
    """Bytes that its body may have."""
    answer: Callable[[Sequence[str], bytes], Reply]
    """Of the pattern's groups and the body."""


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What the page says of itself."""

    model: str
    data: str
    top: int
    """Hits of a query."""


class Routes:
    """The answers to all that may be asked of a searcher."""

    def __init__(self, searcher: Searcher, about: About) -> None:
        self._searcher = searcher
        self._about = about
        self._thumbnail = lru_cache(_KEPT)(self._drawn_small)
        folder = files("cosmos_ssl.search").joinpath("page")
        self._files = {path: Reply(kind, folder.joinpath(name).read_bytes()) for path, (name, kind) in _PAGE.items()}
        row = "([0-9]{1,9})"
        self._table = [
            *(Route("GET", re.compile(re.escape(path)), 0, self._file(path)) for path in _PAGE),
            Route("GET", re.compile("/about"), 0, self._tell_about),
            Route("POST", re.compile("/words"), WORDS_BYTES, self._by_words),
            Route("POST", re.compile("/picture"), PICTURE_BYTES, self._by_picture),
            Route("GET", re.compile(f"/like/{row}"), 0, self._like),
            Route("GET", re.compile(f"/small/{row}"), 0, lambda found, _: self._thumbnail(self._row(found[0]))),
            Route("GET", re.compile(f"/large/{row}"), 0, self._large),
            Route("GET", re.compile(f"/texts/{row}"), 0, self._texts_of),
            Route("POST", re.compile(f"/look/{row}"), WORDS_BYTES, self._look),
        ]

    def find(self, method: str, path: str) -> tuple[Route, Sequence[str]]:
        """The route of a request, and what its pattern's groups hold. Raises Refused where there is none."""
        there = [(route, found.groups()) for route in self._table if (found := route.path.fullmatch(path))]
        for route, groups in there:
            if route.method == ("GET" if method == "HEAD" else method):
                return route, groups
        if there:
            raise Refused(405, f"{path} is asked by {there[0][0].method} alone.")
        raise Refused(404, "There is nothing here.")

    # ------------------------------------------------------------------ answers

    def _file(self, path: str) -> Callable[[Sequence[str], bytes], Reply]:
        return lambda found, body: self._files[path]

    def _tell_about(self, found: Sequence[str], body: bytes) -> Reply:
        index = self._searcher.index
        return _json(
            {
                "model": self._about.model,
                "data": self._about.data,
                "pictures": len(index),
                "shown": index.has_pictures,
                "words": self._searcher.takes_words,
                "looks": self._searcher.attends and index.has_pictures,
                "texts": index.texts is not None,
            }
        )

    def _by_words(self, found: Sequence[str], body: bytes) -> Reply:
        text = _words(body)
        return self._hits(self._searcher.words_vector(text))

    def _by_picture(self, found: Sequence[str], body: bytes) -> Reply:
        try:
            picture = open_rgb(body, background=self._searcher.background)
        except BadSample as error:
            status = 413 if error.reason == "too large" else 400
            raise Refused(
                status, f"This is no picture that can be searched by ({error.detail or error.reason})."
            ) from error
        vector = self._searcher.picture_vector(picture)
        return self._hits(vector, shown=_data_url(thumbnail(picture)), texts=self._told(vector))

    def _like(self, found: Sequence[str], body: bytes) -> Reply:
        row = self._row(found[0])
        return self._hits(hits=self._searcher.like(row, self._about.top))

    def _large(self, found: Sequence[str], body: bytes) -> Reply:
        return Reply("image/webp", thumbnail(self._picture(self._row(found[0])), _LARGE))

    def _texts_of(self, found: Sequence[str], body: bytes) -> Reply:
        return _json({"texts": self._told(self._searcher.vector_of(self._row(found[0])))})

    def _look(self, found: Sequence[str], body: bytes) -> Reply:
        from PIL import Image

        row, text = self._row(found[0]), _words(body)
        try:
            look = self._searcher.look(row, text)
        except BadSample as error:
            raise Refused(404, f"This picture cannot be read any more ({error}).") from error
        drawn = Image.fromarray(look.overlay.permute(1, 2, 0).contiguous().numpy())
        words = [{"word": word, "weight": round(weight, 4)} for word, weight in look.words]
        return _json({"picture": _data_url(webp(drawn)), "words": words})

    # ------------------------------------------------------------------ what they are made of

    def _hits(self, vector: Vectors | None = None, *, hits: Sequence[Hit] | None = None, **more: Any) -> Reply:
        if hits is None:
            assert vector is not None
            hits = self._searcher.nearest(vector, self._about.top)
        rows = []
        for hit in hits:
            entry = self._searcher.index.entry(hit.row)
            told = {"key": entry.key, "file": entry.file, "caption": entry.caption}
            rows.append({"row": hit.row, "score": round(hit.score, 6), **told})
        return _json({"hits": rows, **more})

    def _told(self, vector: Vectors) -> list[dict[str, Any]]:
        return [{"text": text, "score": round(score, 6)} for text, score in self._searcher.texts(vector, _TEXTS)]

    def _row(self, number: str) -> int:
        if (row := int(number)) >= len(self._searcher.index):
            raise Refused(404, f"There is no picture {row}: the last one is {len(self._searcher.index) - 1}.")
        return row

    def _picture(self, row: int) -> Image.Image:
        try:
            return self._searcher.index.picture(row, self._searcher.background)
        except BadSample as error:
            raise Refused(404, f"This picture cannot be shown ({error}).") from error

    def _drawn_small(self, row: int) -> Reply:
        return Reply("image/webp", thumbnail(self._picture(row), THUMBNAIL))


def answer(route: Route, groups: Sequence[str], body: bytes) -> Reply:
    """The answer of a route. Raises Refused for what it cannot be given."""
    try:
        return route.answer(groups, body)
    except UserError as error:
        sentence = str(error)
        raise Refused(400, f"{sentence[:1].upper()}{sentence[1:]}.") from error


def _words(body: bytes) -> str:
    """The text of a question, which is JSON: ``{"text": ...}``."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, 'The question is no JSON such as {"text": "a red heart"}.') from error
    text = asked.get("text") if isinstance(asked, Mapping) else None
    if not isinstance(text, str):
        raise Refused(400, 'The question has no text: {"text": "a red heart"}.')
    if len(text) > _WORDS_LETTERS:
        raise Refused(413, f"The text has {len(text):,} letters, at most {_WORDS_LETTERS:,}.")
    return text.encode("utf-8", "replace").decode()  # JSON can hold half of a letter


def _json(value: Mapping[str, Any]) -> Reply:
    return Reply("application/json", json.dumps(value, allow_nan=False).encode())


def _data_url(picture: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(picture).decode()}"
