"""Small shards made on the spot, and plain augmenters and tokenizer to load them with."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cosmos_ssl.api import Augmenter, ImageCrops, Sample, Tokenizer, ViewSpec
from cosmos_ssl.data import storage


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(storage, "RETRY_SECONDS", (0.001, 0.001))


def jpeg(number: int, side: int = 24) -> bytes:
    """A picture whose colour tells its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (number % 256, number // 256, 77)).save(buffer, "png")
    return buffer.getvalue()


def members_of(number: int) -> dict[str, bytes]:
    """A sample as the tests' shards hold it, by extension."""
    table = {"raw_caption": [f"raw {number}"], "longIB_captions": [f"long {number} a", f"long {number} b"], "number": number}
    return {"png": jpeg(number), "json": json.dumps(table).encode(), "txt": f"text {number}".encode(), "cls": str(number % 5).encode()}


def write_tar(path: Path, samples: Sequence[tuple[str, Mapping[str, bytes]]], format: int = tarfile.USTAR_FORMAT) -> Path:
    """A shard of (key, {extension: bytes})."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for key, parts in samples:
            for extension, body in parts.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    return path


@pytest.fixture
def tar() -> Callable[..., Path]:
    """``write_tar``."""
    return write_tar


@pytest.fixture
def parts() -> Callable[[int], dict[str, bytes]]:
    """``members_of``."""
    return members_of


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., str]:
    """Make shards of these sizes; their pattern. Samples are numbered through."""

    def make(*sizes: int, folder: str = "shards", change: Callable[[int, dict[str, bytes]], Any] = lambda i, m: None) -> str:
        number = 0
        for shard, size in enumerate(sizes):
            samples = []
            for _ in range(size):
                found = members_of(number)
                change(number, found)
                samples.append((f"key{number:05d}", found))
                number += 1
            write_tar(tmp_path / folder / f"a-{shard:03d}.tar", samples)
        return str(tmp_path / folder / f"a-{{000..{len(sizes) - 1:03d}}}.tar")

    return make


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
        return {"global": ImageCrops(pixels=torch.stack([crop, crop.flip(2)]), params=params, masks=torch.tensor(rng.random((2, 4)) < 0.5))}


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
    """What a Loader needs beside data set and order."""
    return {"image": Crops(), "text": Texts(), "tokenizer": Bytes()}
