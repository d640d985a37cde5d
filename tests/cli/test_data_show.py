"""``cosmos-ssl data show``: the views of a config as pictures and a page."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cosmos_ssl.build import Builder
from cosmos_ssl.config import load_config
from cosmos_ssl.data import Shards, sample_rng
from cosmos_ssl.evaluation.contact_sheet import SampleLook, contact_sheet, look

SMALL = ["augmenters.image.global_crops_size=64", "augmenters.image.local_crops_size=32", "model.image.image_size=64"]
SMALL += ["model.image.layers=1", "model.text.layers=1", "model.image.patch_size=16"]
CONFIG = "cosmos/vitb16_cc3m.yaml"


@pytest.fixture
def shard(tmp_path: Path) -> str:
    """Six samples with captions under ``a``; the third is no picture."""
    path = tmp_path / "train-0000.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(6):
            buffer = io.BytesIO()
            Image.fromarray(np.random.default_rng(number).integers(0, 256, (80, 100, 3), np.uint8)).save(buffer, "png")
            body = b"none" if number == 2 else buffer.getvalue()
            text = json.dumps({"a": [f"<b>first</b> {number}", "second", "third"]}).encode()
            for extension, data in (("png", body), ("json", text)):
                info = tarfile.TarInfo(f"{number}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


def test_page_and_pictures(shard: str, tmp_path: Path, command) -> None:  # type: ignore[no-untyped-def]
    argv = [
        "data",
        "show",
        shard,
        "--config",
        CONFIG,
        "--output",
        str(tmp_path / "o"),
        "data.caption_schema=json:a",
        *SMALL,
    ]
    code, out, _ = command(*argv)
    assert code == 0 and "5 samples" in out and "sample 2: undecodable" in out
    html = (tmp_path / "o" / "index.html").read_text()
    assert "global 2 of 2" in html and "local 6 of 6" in html and "&lt;b&gt;first" in html and "<b>first" not in html
    assert sorted(path.name for path in (tmp_path / "o").glob("*.png")) == [f"{n:03d}.png" for n in range(5)]
    first = (tmp_path / "o" / "000.png").read_bytes()
    command(*argv)
    assert (tmp_path / "o" / "000.png").read_bytes() == first, "the same seed draws the same"
    command(*argv, "--seed", "5")
    assert (tmp_path / "o" / "000.png").read_bytes() != first


def test_transparent_pictures_are_put_on_the_background(tmp_path: Path, command) -> None:  # type: ignore[no-untyped-def]
    clear = io.BytesIO()
    Image.new("RGBA", (80, 80), (0, 0, 0, 0)).save(clear, "png")
    with tarfile.open(tmp_path / "c.tar", "w") as tar:
        for extension, data in (("png", clear.getvalue()), ("txt", b"a. b.")):
            info = tarfile.TarInfo(f"0.{extension}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    argv = [
        "data",
        "show",
        str(tmp_path / "c.tar"),
        "--config",
        CONFIG,
        "--output",
        str(tmp_path / "o"),
        "data.caption_schema=txt",
    ]
    assert command(*argv, *SMALL, "model.background=teal")[0] == 0
    assert Image.open(tmp_path / "o" / "000.png").getpixel((20, 20)) == (0, 128, 128)


def test_captions_by_another_schema_are_told(shard: str, tmp_path: Path, command) -> None:  # type: ignore[no-untyped-def]
    argv = ["data", "show", shard, "--config", CONFIG, "--output", str(tmp_path / "o"), *SMALL]
    code, _, err = command(*argv)
    assert code == 2 and "no captions by the schema 'dreamlip'" in err
    (tmp_path / "shards.json").write_text(json.dumps({"caption_schema": "json:a"}))
    code, out, _ = command(*argv)
    assert code == 0 and "Train with data.caption_schema=json:a" in out


def test_views_are_those_of_the_augmenters(shard: str) -> None:
    loaded = load_config(CONFIG, SMALL)
    augmenters, spec = Builder(loaded).for_views()
    sample = Shards(shard, caption_schema="json:a").read(1)
    found = look(sample, augmenters, spec.image, seed=3, position=1)
    assert {name: tuple(views.shape) for name, views in found.images.items()} == {
        "global": (2, 3, 64, 64),
        "local": (6, 3, 32, 32),
    }
    assert torch.equal(found.picture, sample.decode())
    texts = augmenters["text"].crop(sample, sample_rng(3, 0, 1, text=True))
    assert {name: list(views) for name, views in texts.items()} == dict(found.texts)
    crops = augmenters["image"].crop(sample, sample_rng(3, 0, 1))
    assert crops["global"].pixels.shape == found.images["global"].shape  # type: ignore[union-attr, call-overload]
    assert all(views.float().std() > 1 for views in found.images.values()), "shown without the normalisation"


def test_a_sheet_is_as_wide_as_its_views() -> None:
    """The picture stands beside the first views, small ones are enlarged, and the texts take the width that there
    is.
    """
    views = {
        "global": torch.full((2, 3, 32, 32), 9, dtype=torch.uint8),
        "local": torch.full((2, 3, 16, 16), 99, dtype=torch.uint8),
    }
    sheet = contact_sheet(
        SampleLook(
            key="a", picture=torch.zeros(3, 40, 50, dtype=torch.uint8), images=views, texts={"global": ["word " * 60]}
        )
    )
    assert sheet.shape[2] == 8 + (200 + 8) + 2 * (224 + 8)  # 50 pixels four times, 32 pixels seven times as large
    assert sheet[0, 8 + 80, [8 + 100, 216 + 112, 216 + 232 + 112]].tolist() == [0, 9, 9]
    assert sheet[0, 8 + 232 + 50, 8 + 50] == 99
    written = (sheet[0, 8 + 232 + 112 + 8 :] < 128).any(0).nonzero()
    assert 0.9 * sheet.shape[2] < written.max() < sheet.shape[2] - 8
    many = SampleLook(
        key="a",
        picture=torch.zeros(3, 224, 224, dtype=torch.uint8),
        images={"global": torch.zeros(9, 3, 224, 224).byte()},
    )
    assert contact_sheet(many).shape[2] == 8 + 4 * 232
