"""Questions asked of an index by a model: words, pictures, more of the same, and what words look at in a hit."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cosmos_ssl.api import UserError
from cosmos_ssl.evaluation.attention_maps import attention_maps, has_attention
from cosmos_ssl.evaluation.features import check_finite
from cosmos_ssl.evaluation.pictures import overlay
from cosmos_ssl.models.encoder import ModelEncoder, resize_crop
from cosmos_ssl.search.index import Index
from cosmos_ssl.search.nearest import Found, Vectors, as_vectors

if TYPE_CHECKING:
    from PIL import Image

_SIDE = 448  # pixels of a picture under its attention, whatever the model's own size is


@dataclass(frozen=True, slots=True)
class Hit:
    """A row that was found, and the cosine of its vector with the query's."""

    row: int
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What words look at in a picture."""

    overlay: Tensor
    """uint8 [3, 448, 448]: the picture, cut as the model sees it, under the colours of the patches' weights."""
    words: Sequence[tuple[str, float]]
    """Each word's weight in 0..1."""


class Searcher:
    """An index and the model that made its vectors. Threads may share it: the model encodes one query at a time."""

    def __init__(self, encoder: ModelEncoder, index: Index) -> None:
        self.encoder = encoder
        self.index = index
        self.background = encoder.spec.background
        self._one = threading.Lock()

    @property
    def takes_words(self) -> bool:
        """Whether the model has a text tower."""
        return "text" in self.encoder.model.towers

    @property
    def attends(self) -> bool:
        """Whether the model can say what words look at."""
        return self.takes_words and has_attention(self.encoder)

    def words_vector(self, text: str) -> Vectors:
        """A text as a unit vector [1, D]. Raises UserError without a text tower, or for no words at all."""
        if not self.takes_words:
            raise UserError("this model has no text tower: search by a picture")
        if not text.strip():
            raise UserError("say in words what to look for")
        with self._one:
            return _vector(self.encoder.encode_text(self.encoder.tokenize([text])), "texts")

    def picture_vector(self, picture: Image.Image) -> Vectors:
        """A picture as a unit vector [1, D]."""
        with self._one:
            return _vector(self.encoder.encode_image(self.encoder.preprocess(picture)[None]), "pictures")

    def nearest(self, vector: Vectors, top: int) -> list[Hit]:
        """The pictures nearest to a vector [1, D], best first."""
        return _hits(self.index.nearest.top(vector, top)[0])

    def vector_of(self, row: int) -> Vectors:
        """The vector [1, D] of a picture of the index."""
        return as_vectors(self.index.nearest.vectors[row : row + 1])

    def like(self, row: int, top: int) -> list[Hit]:
        """The pictures nearest to that of a row, without itself."""
        return [hit for hit in self.nearest(self.vector_of(row), top + 1) if hit.row != row][:top]

    def texts(self, vector: Vectors, top: int) -> list[tuple[str, float]]:
        """The texts nearest to a vector [1, D] with their cosines; a text that several samples have counts once."""
        if self.index.texts is None:
            return []
        found: dict[str, float] = {}
        wanted, every = top, len(self.index.texts.texts)
        while len(found) < top:
            for hit in _hits(self.index.texts.nearest.top(vector, wanted)[0]):
                found.setdefault(self.index.texts.texts[hit.row], hit.score)
            if wanted >= every:
                break
            wanted *= 4
        return list(found.items())[:top]

    def look(self, row: int, text: str) -> Look:
        """What the words of a text look at in the picture of a row.

        Raises UserError for a model that cannot say, BadSample for a picture that cannot be read.
        """
        if not self.attends:
            raise UserError("this model has no cross-attention head: it cannot say where words look")
        if not text.strip():
            raise UserError("say whose look at the picture is wanted: one word or more")
        picture = self.index.picture(row, self.background)
        with self._one:
            found = attention_maps(self.encoder, self.encoder.preprocess(picture)[None], [text])
        assert found is not None
        check_finite(found[0].patches[None], "pictures")
        return Look(overlay=overlay(resize_crop(picture, _SIDE), found[0].patches), words=found[0].words)


def _vector(found: Tensor, what: str) -> Vectors:
    check_finite(found, what)
    return as_vectors(found.to("cpu", torch.float32).numpy())


def _hits(found: Found) -> list[Hit]:
    return [Hit(row, score) for row, score in zip(found.rows.tolist(), found.scores.tolist(), strict=True)]
