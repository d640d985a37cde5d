"""Plain augmenters and tokenizer to load them with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from cosmos_ssl.api import Augmenter, ImageCrops, Sample, Tokenizer, ViewSpec


@pytest.fixture(autouse=True)
def _apart(own_cache: None) -> None:
    """Indexes and downloads of one test are no other's."""


class Crops(Augmenter):
    """Two random crops of 8 pixels and two parameters."""

    modality = "image"

    def offers(self) -> Mapping[str, ViewSpec]:
        return {"global": ViewSpec(views=2, size=8, masks=True)}

    def crop(self, sample: Sample, rng: np.random.Generator) -> Mapping[str, ImageCrops]:
        picture = sample.decode()
        x, y = rng.integers(0, 16, 2)
        crop = picture[:, y : y + 8, x : x + 8]
        params = torch.tensor(rng.random((2, 3)), dtype=torch.float32)
        return {
            "global": ImageCrops(
                pixels=torch.stack([crop, crop.flip(2)]), params=params, masks=torch.tensor(rng.random((2, 4)) < 0.5)
            )
        }


class Texts(Augmenter):
    """Two groups of sentences."""

    modality = "text"

    def offers(self) -> Mapping[str, ViewSpec]:
        return {"global": ViewSpec(views=2), "local": ViewSpec(views=1)}

    def crop(self, sample: Sample, rng: np.random.Generator) -> Mapping[str, Sequence[str]]:
        found = sample.sentences()
        chosen = [found[i] for i in rng.integers(0, len(found), 3)]
        return {"global": chosen[:2], "local": chosen[2:]}


class Bytes(Tokenizer):
    """A byte is a token."""

    vocab_size, context_length, pad_id = 256, 12, 0

    def __call__(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.zeros(len(texts), 12, dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            codes = list(text.encode()[:12])
            row[: len(codes)] = torch.tensor(codes)
        return ids, (ids > 0).sum(1)


@pytest.fixture
def views() -> dict[str, Any]:
    """The parts that a Loader needs beside data set and order."""
    return {"image": Crops(), "text": Texts(), "tokenizer": Bytes()}
