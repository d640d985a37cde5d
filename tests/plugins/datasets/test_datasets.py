"""The data set parts: their options reach the shards, and they are registered under their names."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from cosmos_ssl.api import DataError, Dataset, Spec, UserError, ViewSpec
from cosmos_ssl_plugins.datasets.scenes import Scenes
from cosmos_ssl_plugins.datasets.webdataset import WebDataset

SPEC = Spec(embed_dim=8)


@pytest.fixture
def scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scenes:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Scenes(SPEC, train_samples=20, validation_samples=10, image_size=16)


def test_parts_are_registered() -> None:
    entries = [
        entry for entry in entry_points(group="cosmos_ssl.datasets") if entry.dist and entry.dist.name == "cosmos-ssl"
    ]
    found = {entry.name: entry.load() for entry in entries}
    assert found["scenes"] is Scenes and found["webdataset"] is WebDataset
    assert issubclass(Scenes, Dataset) and issubclass(WebDataset, Dataset)


def test_scenes_are_written_when_first_needed(scenes: Scenes, tmp_path: Path) -> None:
    assert scenes.validation_data is not None and scenes.validation_data.startswith(str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists(), "building the part writes nothing"
    assert scenes.shard_sizes.tolist() == [20]
    held_out = WebDataset(SPEC, train_data=scenes.validation_data)
    held_out.prepare()
    assert held_out.shard_sizes.tolist() == [10]
    assert len(scenes.read(3).captions) == 7 and 0 <= scenes.read(3).extras["cls"] < 64
    assert scenes.identity() == Scenes(SPEC, train_samples=20, validation_samples=10, image_size=16).identity()


def test_scenes_in_a_folder_of_ones_own(tmp_path: Path) -> None:
    data = Scenes(SPEC, train_samples=5, validation_samples=2, image_size=16, folder=str(tmp_path / "mine"))
    data.prepare()
    assert json.loads((tmp_path / "mine" / "sizes.json").read_text()) == {"train-0000.tar": 5, "val-0000.tar": 2}


def test_captions_are_asked_for_where_texts_are_used(scenes: Scenes, tmp_path: Path) -> None:
    scenes.prepare()
    shards = scenes.validation_data or ""
    WebDataset(SPEC, train_data=shards, caption_schema="txt").prepare()
    with pytest.raises(DataError, match="no captions by the schema 'json:nothing'"):
        WebDataset(SPEC, train_data=shards, caption_schema="json:nothing").prepare()
    pictures = Spec(embed_dim=8, image_views={"global": ViewSpec(views=2, size=8)})
    data = WebDataset(pictures, train_data=shards, caption_schema="json:nothing")
    data.prepare()
    assert not data.read(0).captions
    alone = Scenes(pictures, train_samples=20, validation_samples=10, image_size=16)
    assert not alone.read(0).captions and scenes.read(0).captions and alone.read(0).image == scenes.read(0).image


def test_mistakes_show_when_the_part_is_built() -> None:
    with pytest.raises(UserError, match="no schema 'dreamlib'"):
        WebDataset(SPEC, train_data="a.tar", caption_schema="dreamlib")
    with pytest.raises(UserError, match="image_size"):
        Scenes(SPEC, image_size=4)
