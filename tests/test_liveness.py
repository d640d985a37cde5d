"""What takes long before training gives signs of life, by which a run that hangs is told from one that is busy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from cosmos_ssl.data import cache, load_manifest
from cosmos_ssl.data.cache import lock
from cosmos_ssl.data.folder.scan import load_folder
from cosmos_ssl.data.scenes import SceneOptions, write_scenes
from cosmos_ssl.liveness import alive, on_alive
from cosmos_ssl.testing import example_samples

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def beats() -> Iterator[list[None]]:
    """The signs that were given."""
    found: list[None] = []
    with on_alive(lambda: found.append(None)):
        yield found
    alive()  # to nobody any more


def test_every_shard_and_folder(beats: list[None], shards: Callable[..., str], tmp_path: Path) -> None:
    load_manifest(shards(3, 2, 4))
    assert len(beats) >= 3
    beats.clear()
    image = example_samples(1)[0].image
    assert image is not None
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        (tmp_path / "pictures" / name / "x.jpg").write_bytes(image)
    load_folder(tmp_path / "pictures")
    assert len(beats) >= 3


def test_every_shard_of_scenes(beats: list[None], tmp_path: Path) -> None:
    write_scenes(
        tmp_path / "scenes", SceneOptions(train_samples=20, validation_samples=10, image_size=32, shard_samples=10)
    )
    assert len(beats) >= 3


def test_who_waits_for_another(beats: list[None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait() -> None:
        with lock(tmp_path / "x.lock", lambda: told.append(None)):
            got.set()

    monkeypatch.setattr(cache, "_WAIT_SECONDS", 0.01)
    told: list[None] = []
    got, waiting = threading.Event(), threading.Thread(target=wait)
    with FileLock(tmp_path / "x.lock"):
        waiting.start()
        while len(beats) < 3 or not told:
            assert not got.wait(0.01)
    waiting.join(10)
    assert got.is_set() and len(told) == 1
