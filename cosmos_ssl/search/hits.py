"""What was found, as files: ``index.html``, a page with its pictures in it, and ``hits.json``."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_ssl.api import BadSample
from cosmos_ssl.evaluation.page import Page
from cosmos_ssl.files import storage_faults, written_whole
from cosmos_ssl.search.searcher import Hit, Searcher

if TYPE_CHECKING:
    from PIL import Image

THUMBNAIL = 320
"""Pixels of the longer side of a picture that is shown among others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A query and what it found."""

    query: str
    """The words, or the name of the picture."""
    hits: Sequence[Hit]
    picture: Image.Image | None = None
    """The picture that was asked for."""


def rows_of(searcher: Searcher, answer: Answer) -> list[dict[str, Any]]:
    """The hits of a query: query, rank (from 1), score, key, file and caption of each."""
    rows = []
    for rank, hit in enumerate(answer.hits, 1):
        entry = searcher.index.entry(hit.row)
        told = {"key": entry.key, "file": entry.file, "caption": entry.caption}
        rows.append({"query": answer.query, "rank": rank, "score": round(hit.score, 6), **told})
    return rows


def write_hits(
    searcher: Searcher, answers: Sequence[Answer], folder: Path, *, subtitle: str
) -> list[list[dict[str, Any]]]:
    """Write the page and ``hits.json``, the rows of all queries, into ``folder``; the rows of each query.

    Raises UserError where it cannot, StorageError.
    """
    rows = [rows_of(searcher, answer) for answer in answers]
    page = Page("Search", subtitle)
    for answer, own in zip(answers, rows, strict=True):
        page.section(answer.query)
        if answer.picture is not None:
            page.figure(thumbnail(answer.picture), "the picture that was asked for").text("")  # hits begin a row
        if not searcher.index.has_pictures:
            page.table([("rank", "score", "key"), *((row["rank"], row["score"], row["key"]) for row in own)])
            continue
        for hit, row in zip(answer.hits, own, strict=True):
            _add(page, searcher, hit, row)
    with storage_faults(f"--output {folder}: cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(folder / "hits.json") as file:
            table = json.dumps([row for own in rows for row in own], indent=2, ensure_ascii=False)
            file.write(f"{table}\n".encode("utf-8", "replace"))
        page.write(folder / "index.html")
    return rows


def _add(page: Page, searcher: Searcher, hit: Hit, row: dict[str, Any]) -> None:
    told = "\n".join(str(part) for part in (f"{row['rank']}.  {row['score']:.3f}", row["caption"], row["key"]) if part)
    try:
        page.figure(thumbnail(searcher.index.picture(hit.row, searcher.background)), told)
    except BadSample as error:
        page.text(f"{told}\n({error})")


def thumbnail(picture: Image.Image, side: int = THUMBNAIL) -> bytes:
    """A picture (RGB), its longer side at most ``side`` pixels, as WebP."""
    small = picture.copy()
    small.thumbnail((side, side))
    return webp(small)


def webp(picture: Image.Image) -> bytes:
    """A picture as WebP."""
    file = io.BytesIO()
    picture.save(file, "webp", quality=88)
    return file.getvalue()
