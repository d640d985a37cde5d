"""The pictures that are searched, by the row of their vector: what each is called, where it lies, and what it shows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cosmos_ssl.api import BadSample, FileBacked, Sample
from cosmos_ssl.evaluation.embedding_input import WithSource
from cosmos_ssl.pictures import open_rgb
from cosmos_ssl.search.nearest import Nearest

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What is known of a picture."""

    key: str
    file: str | None
    """The picture's file, or the shard that it lies in; None where only embeddings are there."""
    caption: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Texts that pictures can be told by."""

    nearest: Nearest
    texts: Sequence[str]
    """Of each row."""


class Index:
    """Pictures by row.

    ``keys`` are those of the rows; ``samples`` what they were made of, in the same order but for ``left_out`` that
    could not be embedded (None: only the embeddings are there). ``captions`` is the field of the captions.
    """

    def __init__(
        self,
        nearest: Nearest,
        keys: Sequence[str],
        *,
        samples: WithSource | None = None,
        left_out: int = 0,
        captions: str | None = None,
        texts: Texts | None = None,
    ) -> None:
        self.nearest = nearest
        self.keys = keys
        self.texts = texts
        self._samples = samples
        self._left_out = left_out
        self._captions = captions

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def has_pictures(self) -> bool:
        """Whether pictures can be shown, not only named."""
        return self._samples is not None

    def entry(self, row: int) -> Entry:
        """What is known of the picture of a row, also where it can no longer be read."""
        try:
            place, sample = self._sample(row)
        except (BadSample, OSError):
            return Entry(key=self.keys[row], file=None, caption=None)
        assert self._samples is not None
        source = self._samples.describe(place)
        if isinstance(self._samples, FileBacked):
            source = self._samples.sources(place)[0]
        said = sample.captions.get(self._captions or "", ())
        return Entry(key=sample.key, file=source, caption=next(iter(said), None))

    def picture(self, row: int, background: str) -> Image.Image:
        """The picture of a row as RGB. Raises BadSample where it cannot be read (any more)."""
        try:
            _, sample = self._sample(row)
        except OSError as error:
            raise BadSample("unreadable", error.strerror or str(error)) from error
        if sample.image is None:
            raise BadSample("no image")
        return open_rgb(sample.image, max_pixels=sample.max_pixels, background=background)

    def _sample(self, row: int) -> tuple[int, Sample]:
        """The sample of a row and its place. Raises BadSample where there is none of the row's key, OSError."""
        if self._samples is None:
            raise BadSample("no picture", "only embeddings are there")
        place = self._place(row)
        if place is not None:
            sample = self._samples.read(place)
            if _line(sample.key) == self.keys[row]:
                return place, sample
        raise BadSample("no picture", f"{self.keys[row]} is not where it was when it was embedded")

    def _place(self, row: int) -> int | None:
        """The place of a row's sample, which lies behind its own by as many as were left out before it: by bisection.

        None where that cannot be told.
        """
        low, high = row, row + self._left_out
        if low == high:
            return row
        while low <= high:
            middle = (low + high) // 2
            known = ((place, at) for place in range(middle, high + 1) if (at := self._row(place)) is not None)
            place, at = next(known, (high, row + 1))
            if at == row:
                return place
            low, high = (place + 1, high) if at < row else (low, middle - 1)
        return None

    def _row(self, place: int) -> int | None:
        """The row of a sample; None where it was left out, or another of those around it has the same key."""
        assert self._samples is not None
        with suppress(BadSample):
            key, first = _line(self._samples.read(place).key), max(0, place - self._left_out)
            around = self.keys[first : place + 1]
            return first + around.index(key) if around.count(key) == 1 else None
        return None


def _line(key: str) -> str:
    """A key as files of embeddings hold it."""
    return " ".join(key.splitlines()).encode("utf-8", "replace").decode()
