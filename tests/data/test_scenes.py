"""Procedural scenes: the same every time, true to their sentences, written all or nothing."""

from __future__ import annotations

import hashlib
import io
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from cosmos_ssl.data import open_shards
from cosmos_ssl.data.captions import DREAMLIP_FIELDS
from cosmos_ssl.data.scenes import CLASS_NAMES, SceneOptions, default_folder, write_scenes
from cosmos_ssl.data.scenes.pictures import COLOURS, SHAPES, caption, draw, make_scene, sentences
from cosmos_ssl.errors import DataError, StorageError, UserError

SMALL = SceneOptions(train_samples=60, validation_samples=30, image_size=32, shard_samples=25)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tar")}


def test_shards_are_the_same_every_time(tmp_path: Path) -> None:
    one, two = write_scenes(tmp_path / "one", SMALL), write_scenes(tmp_path / "two", SMALL)
    assert digests(one) == digests(two)
    assert sorted(digests(one)) == [
        "train-0000.tar",
        "train-0001.tar",
        "train-0002.tar",
        "val-0000.tar",
        "val-0001.tar",
    ]
    other = SceneOptions(train_samples=60, validation_samples=30, image_size=32, shard_samples=25, seed=1)
    assert set(digests(write_scenes(tmp_path / "other", other)).values()).isdisjoint(digests(one).values())
    assert default_folder(other) != default_folder(SMALL)


def test_any_reader_of_webdataset_reads_them(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path / "scenes", SMALL)
    urls = sorted(map(str, folder.glob("val-*.tar")))
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(found) == 30 and {"png", "mask.png", "json", "txt", "cls"} <= set(found[0])
    table = json.loads(found[0]["json"])
    assert list(table) == list(DREAMLIP_FIELDS) and all(isinstance(v, list) and v for v in table.values())


def test_validation_captions_tell_scenes_apart(tmp_path: Path) -> None:
    data = open_shards(SMALL.pattern(write_scenes(tmp_path / "scenes", SMALL), "val"))
    assert len(data) == 30 and len({data.read(i).captions["txt"][0] for i in range(30)}) == 30


def test_labels_and_masks_are_of_the_objects(tmp_path: Path) -> None:
    data = open_shards(SMALL.pattern(write_scenes(tmp_path / "scenes", SMALL), "train"))
    for i in range(20):
        sample = data.read(i)
        mask = np.array(Image.open(io.BytesIO(sample.extras["mask.png"])))
        assert mask.shape == tuple(sample.decode().shape[1:])
        text = sample.captions["txt"][0]
        words = re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", text)
        named = {CLASS_NAMES.index(f"{colour} {shape}") + 1 for colour, shape in words}
        assert set(np.unique(mask).tolist()) == {0} | named
        assert text.startswith("a large") and text.split(" at ")[0].endswith(CLASS_NAMES[sample.extras["cls"]])


def test_fewer_colours_give_fewer_classes(tmp_path: Path) -> None:
    options = SceneOptions(train_samples=1, validation_samples=60, image_size=32, colours=3)
    folder = write_scenes(tmp_path / "scenes", options)
    names = (folder / "classes.txt").read_text().splitlines()
    assert (
        names
        == [f"{colour} {shape}" for colour in ("red", "yellow", "green") for shape in SHAPES]
        == list(options.class_names)
    )
    data = open_shards(options.pattern(folder, "val"))
    said = {
        name for i in range(60) for name in re.findall(rf"({'|'.join(CLASS_NAMES)})", data.read(i).captions["txt"][0])
    }
    assert said == set(names)


def test_sentences_are_true() -> None:
    """Checked against the mask: where each named class lies is where the sentences say."""
    for number in range(50):
        rng = np.random.default_rng(number)
        scene = make_scene(rng)
        _, mask = draw(scene, 64)
        centre = {t.name: np.argwhere(mask == t.label + 1).mean(0) for t in scene.things}
        area = {t.name: (mask == t.label + 1).sum() for t in scene.things}
        found = sentences(scene, rng)
        for sentence in found["longSV_captions"]:
            match = re.fullmatch(r"The (.+) is (.+) the (.+)", sentence)
            assert match is not None
            (y, x), relation, (v, u) = centre[match[1]], match[2], centre[match[3]]
            assert ("above" in relation) <= (y < v) and ("below" in relation) <= (y > v)
            assert ("left of" in relation) <= (x < u) and ("right of" in relation) <= (x > u)
        for sentence in found["longIB_captions"]:
            match = re.fullmatch(r"A (?:large|small) (?:\w+ )?(\w+ \w+) is at the (\w+) (\w+)", sentence)
            assert match is not None
            y, x = centre[match[1]]
            assert (match[2], match[3]) == ("top" if y < 32 else "bottom", "left" if x < 32 else "right")
        assert f"There are {['', '', 'two', 'three', 'four'][len(scene.things)]} shapes" in found["longLLA_captions"][0]
        assert found["raw_caption"] == [caption(scene)] and len(area) == len(scene.things)


def test_colours_are_seen_in_the_picture() -> None:
    scene = make_scene(np.random.default_rng(1))
    picture, mask = draw(scene, 96)
    for thing in scene.things:
        if thing.texture == "plain":
            inside = picture[mask == thing.label + 1].astype(float)
            assert np.abs(np.median(inside, 0) - COLOURS[thing.colour]).max() < 2


def test_written_once_by_whoever_comes_first(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as threads:
        folders = list(threads.map(lambda _: write_scenes(tmp_path / "scenes", SMALL), range(3)))
    before = {path: path.stat().st_mtime_ns for path in folders[0].iterdir()}
    assert write_scenes(tmp_path / "scenes", SMALL) == folders[0]
    assert {path: path.stat().st_mtime_ns for path in folders[0].iterdir()} == before
    assert not list(tmp_path.glob("*.part")) + list(tmp_path.glob(".*.part"))


def test_a_failed_writer_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cosmos_ssl.data.scenes.writing._write_all", full)
    with pytest.raises(StorageError, match="cannot be written: No space left on device"):
        write_scenes(tmp_path / "scenes", SMALL)
    assert not (tmp_path / "scenes").exists() and not list(tmp_path.glob(".*.part"))


def test_other_content_is_never_overwritten(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", SMALL)
    with pytest.raises(DataError, match="holds something else"):
        write_scenes(tmp_path / "scenes", SceneOptions(train_samples=10))
    (tmp_path / "scenes" / "scenes.json").write_text("{")  # damaged
    with pytest.raises(DataError, match="holds something else"):
        write_scenes(tmp_path / "scenes", SMALL)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(DataError, match="holds something else"):
        write_scenes(tmp_path / "mine", SMALL)


@pytest.mark.parametrize(
    "options", [{"image_size": 8}, {"train_samples": 0}, {"shard_samples": -1}, {"colours": 1}, {"colours": 9}]
)
def test_senseless_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        SceneOptions(**options)
