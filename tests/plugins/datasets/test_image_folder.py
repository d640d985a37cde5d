"""Image folders as training data: how samples are assigned to shards, captions where texts are trained on, and whole
runs.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections import Counter
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cosmos_ssl
from cosmos_ssl.api import DataError, Loss, LossOutput, Need, Spec, StepContext, ViewSpec
from cosmos_ssl.data import Order
from cosmos_ssl.errors import ConfigError, UserError
from cosmos_ssl_plugins.datasets.image_folder import ImageFolder

SPEC = Spec(embed_dim=8, image_views={"global": ViewSpec(views=1, size=8)})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def write(root: Path, classes: int, each: int, captions: bool = False) -> str:
    """Class folders of pictures in one colour a class, with some noise."""
    rng = np.random.default_rng(0)
    for number in range(classes):
        folder = root / f"class {number:02d}"
        folder.mkdir(parents=True)
        colour = np.random.default_rng(number).integers(0, 200, 3)
        for n in range(each):
            pixels = (colour + rng.integers(0, 50, (20, 24, 3))).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "jpeg")
            (folder / f"{n:03d}.JPEG").write_bytes(buffer.getvalue())
            if captions:
                (folder / f"{n:03d}.txt").write_text(f"picture {n} of class {number}")
    return str(root)


def named(root: Path, classes: int, each: int) -> str:
    """The names alone."""
    for number in range(classes):
        (root / f"{number:03d}").mkdir(parents=True)
        for n in range(each):
            (root / f"{number:03d}" / f"{n}.png").touch()
    return str(root)


def test_it_is_registered() -> None:
    (entry,) = [e for e in entry_points(group="cosmos_ssl.datasets") if e.name == "image_folder"]
    assert entry.load() is ImageFolder


@pytest.mark.parametrize("count", [1, 5, 8, 9, 16, 17, 23, 24, 63])
def test_every_picture_is_in_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(ImageFolder, "max_shard_size", 8)
    data = ImageFolder(SPEC, train_data=named(tmp_path / "data", 1, count))
    sizes = data.shard_sizes
    assert sizes.sum() == count and sizes.max() <= 8 and len(sizes) == -(-count // 8)
    places = [data.place(i) for i in range(count)]
    assert sorted(places) == list(range(count))
    shards = np.split(places, np.cumsum(sizes)[:-1])
    assert all((np.diff(shard) == len(sizes)).all() for shard in shards), "a shard holds every so manieth picture"
    with pytest.raises(IndexError):
        data.place(count)


def test_batches_of_large_sets_mix_the_classes(tmp_path: Path) -> None:
    """Beyond ``shuffle_samples`` the order works by shards and windows: 40 classes of 100, lanes of 1,000 and windows
    of 128.
    """
    data = ImageFolder(SPEC, train_data=named(tmp_path / "data", 40, 100))

    def classes_a_batch(sizes: Any, place: Any) -> float:
        order = Order(sizes, 32, lanes=4, shuffle_samples=512, seed=0)
        return float(
            np.mean(
                [len({place(i) // 100 for i in order.batch(step).tolist()}) for step in range(order.steps_per_epoch)]
            )
        )

    expected = 40 * (1 - (39 / 40) ** 32)  # classes among 32 independent draws: 22.2
    assert abs(classes_a_batch(data.shard_sizes, data.place) - expected) < 1.5
    assert classes_a_batch([100] * 40, lambda i: i) < 12, (
        "class folders as shards: a lane is in two or three classes at a time"
    )
    order = Order(data.shard_sizes, 32, lanes=4, shuffle_samples=512, seed=0)
    first, second = (
        Counter(data.place(i) // 100 for i in order.batch(step).tolist()) for step in (0, order.steps_per_epoch)
    )
    assert first != second, "other classes at the same step of the next epoch"


def test_samples_carry_their_class(tmp_path: Path) -> None:
    data = ImageFolder(SPEC, train_data=write(tmp_path / "data", 3, 30), validation_data="elsewhere")
    data.prepare()
    assert data.validation_data == "elsewhere"
    for i in range(90):
        sample = data.read(i)
        assert sample.extras == {"cls": (place := data.place(i)) // 30, "class_name": f"class {place // 30:02d}"}
        assert (
            sample.key == f"class {place // 30:02d}/{place % 30:03d}.JPEG"
            and data.describe(i) == sample.extras["class_name"]
        )
    assert data.identity() == ImageFolder(SPEC, train_data=str(tmp_path / "data")).identity()


def test_captions_are_read_where_texts_are_trained_on(tmp_path: Path) -> None:
    texts = Spec(embed_dim=8, text_views={"global": ViewSpec(views=1)})
    bare, told = write(tmp_path / "bare", 2, 2), write(tmp_path / "told", 2, 2, captions=True)
    with pytest.raises(DataError, match="no captions beside the pictures"):
        ImageFolder(texts, train_data=bare).prepare()
    ImageFolder(SPEC, train_data=bare).prepare()
    assert ImageFolder(texts, train_data=told).read(0).captions == {"txt": ["picture 0 of class 0"]}
    assert not ImageFolder(SPEC, train_data=told).read(0).captions


def test_mistakes(tmp_path: Path) -> None:
    write(tmp_path / "train", 2, 4)
    ImageFolder(SPEC, train_data=str(tmp_path / "trian"))  # a check builds the part without the data
    with pytest.raises(DataError, match=r"/trian does not exist\. Did you mean 'train'\?"):
        ImageFolder(SPEC, train_data=str(tmp_path / "trian")).prepare()
    with pytest.raises(DataError, match=r"^data: .*/trian does not exist"):
        cosmos_ssl.train(config(tmp_path), [f"data.train_data={tmp_path}/trian"])
    with pytest.raises(
        ConfigError, match=r"evaluators\.knn\.train_data: .*/trian does not exist\. Did you mean 'train'"
    ):
        cosmos_ssl.train(config(tmp_path), [f"evaluators.knn.train_data={tmp_path}/trian"])
    with pytest.raises(ValueError, match=r"^extensions: none are given"):
        ImageFolder(SPEC, train_data="x", extensions=())


class Spread(Loss):
    """Pictures of a batch far from one another."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()

    def requires(self) -> list[Need]:
        return [Need(modality="image", group="global")]

    def forward(self, ctx: StepContext) -> LossOutput:
        x = ctx.student.image["global"].unit[0]
        assert all(isinstance(number, int) for number in ctx.views.extras["cls"])
        return LossOutput(terms={"spread": (x @ x.T).square().mean()})


def config(folder: Path) -> dict[str, Any]:
    """A run on pictures alone: no text tower, no tokenizer, no captions."""
    return {
        "extends": "base.yaml",
        "name": "folders",
        "output_dir": str(folder / "run"),
        "model": {
            "embed_dim": 16,
            "image": {"type": "clip_vit", "width": 32, "layers": 1, "heads": 2, "patch_size": 8, "image_size": 16},
        },
        "augmenters": {"image": {"type": "resize_crop", "size": 16}},
        "losses": {"spread": {"type": Spread}},
        "data": {"type": "image_folder", "train_data": str(folder / "train"), "validation_data": str(folder / "val")},
        "loader": {"workers": 0},
        "schedule": {"epochs": 2, "warmup_steps": 1},
        "training": {"batch_size": 8, "precision": "fp32"},
        "evaluators": {"knn": {"type": "knn", "train_data": str(folder / "train"), "k": 3}},
        "logging": {"every_steps": 1, "tensorboard": False},
    }


def test_a_run_on_pictures_alone(tmp_path: Path) -> None:
    write(tmp_path / "train", 4, 9)
    write(tmp_path / "val", 4, 3)
    (tmp_path / "train" / "class 00" / "000.JPEG").write_bytes(b"no picture")
    found = cosmos_ssl.train(config(tmp_path), ["loader.error_budget=0.5"])
    assert found["knn/student/top1"] > 0.7  # by colour; chance is 0.25
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    (tmp_path / "train").rename(tmp_path / "moved")
    moved = config(tmp_path) | {
        "data": {"type": "image_folder", "train_data": str(tmp_path / "moved")},
        "evaluators": None,
    }
    assert cosmos_ssl.train(moved, ["loader.error_budget=0.5"])["loss"] == found["loss"], "the same run, finished"
    changed = tmp_path / "moved" / "class 01" / "000.JPEG"
    changed.write_bytes(changed.read_bytes()[::-1])
    with pytest.raises(UserError, match=r"another data set \(data, content: '\w+' -> '\w+'\)"):
        cosmos_ssl.train(moved, ["loader.error_budget=0.5"])
    changed.unlink()
    with pytest.raises(UserError, match="samples: 36 -> 35"):
        cosmos_ssl.train(moved, ["schedule.epochs=2"])


def test_the_command_trains_with_images_and_texts(tmp_path: Path) -> None:
    write(tmp_path / "train", 2, 8, captions=True)
    text = {
        "model": {**config(tmp_path)["model"], "text": {"type": "clip_text", "width": 32, "layers": 1, "heads": 2}},
        "tokenizer": {"type": "clip", "context_length": 16},
        "augmenters": {
            "image": {"type": "resize_crop", "size": 16},
            "text": {"type": "text_crop", "caption_fields": ["txt"]},
        },
        "losses": {"clip": {"type": "clip"}},
        "data": {"type": "image_folder", "train_data": "train", "validation_data": "train"},
        "evaluators": {"retrieval": {"type": "retrieval"}, "classification": {"type": "classification"}},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config(tmp_path) | text))
    program = str(Path(sys.executable).parent / "cosmos-launch")
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "xdg"), "COLUMNS": "200"}
    command = [program, "--config", "run.yaml", "schedule.epochs=1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {key for row in rows for key in row} >= {
        "retrieval/student/image_to_text_R@1",
        "classification/student/top1",
    }
