"""The data of evaluators: which samples are read, in what order, what is told of bad ones."""

import logging
import os
import tarfile
from contextlib import closing

import pytest
import torch
from PIL import Image

from cosmos_ssl.api import DataError
from cosmos_ssl.data import Folder, open_shards
from cosmos_ssl.evaluation import samples
from cosmos_ssl.evaluation.features import Job, sharded_features
from cosmos_ssl.evaluation.samples import EvaluationData, Sources, read_ahead


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Ten grey pictures in two class folders; a broken one in the second."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    for number in range(10):
        path = tmp_path / "data" / ("b" if number > 5 else "a") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 6), (number, number, number)).save(path)
    path.write_bytes(b"no picture")
    return tmp_path / "data"


def read(data, **options):
    """The grey and the class of each picture, and what was told of: by the base that all evaluations stand on."""

    def compute(loaded):
        return torch.stack([one.pixels for one in loaded]), [
            [one.place, one.sample.key, one.sample.extras["cls"]] for one in loaded
        ]

    job = Job(allow_missing=True, data=data.name, **options)
    rows, notes = sharded_features(data.samples, lambda picture: picture[0, 0, :1].float(), compute, job, name="grey")
    return rows.whole(), notes


def test_pictures_of_a_folder_are_sorted(folder, caplog):
    data = EvaluationData(str(folder))
    with caplog.at_level(logging.WARNING):
        rows, notes = read(data, batch_size=4, workers=2)
    assert rows[:, 0].tolist() == list(range(9))
    assert [number for _, _, number in notes] == [0] * 6 + [1] * 3
    assert f"{folder}: 1 of 10 pictures cannot be used (b/9.png: undecodable: " in caplog.text
    assert data.class_names == ("a", "b") and data.class_file is None
    assert torch.equal(data.samples.read(notes[6][0]).decode()[:, 0, 0], torch.full((3,), 6, dtype=torch.uint8))


def test_evenly_spread_samples_come_from_all_classes(folder):
    _, notes = read(EvaluationData([str(folder)]), max_samples=3)
    assert [key for _, key, _ in notes] == ["a/0.png", "a/3.png", "b/6.png"]


def test_sizes_and_times_of_files(folder, tmp_path):
    """Of a folder each picture and its text, of shards each shard; also where only the time differs, or a file is
    gone.
    """
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as tar:
        for path in sorted(folder.glob("a/*.png")):
            tar.add(path, path.name)
    text = folder / "a" / "1.txt"
    text.write_text("one")
    for data, file, inside, outside in (
        (Folder(folder), folder / "a" / "1.png", 1, 2),
        (Folder(folder), text, 1, 2),
        (open_shards(str(shard)), shard, 0, None),
    ):
        sources = Sources(data)
        before, whole = sources.stamp(inside), sources.digest()
        assert outside is None or sources.stamp(outside) != before
        assert not sources.changed() and sources.digest() == whole
        os.utime(file, ns=(10**18, 10**18))
        assert sources.changed() == [str(file)] and sources.digest() != whole
        assert sources.stamp(inside) == before != Sources(data).stamp(inside), "as it was when it was first looked at"
    text.unlink()
    assert Sources(Folder(folder, captions=False)).stamp(1) == Sources(Folder(folder)).stamp(1)[:1]


def test_contents_of_files_count(folder, monkeypatch):
    """Another picture of the same name, size and times is another one."""
    monkeypatch.setattr(samples, "stat", lambda url: (10, "then"))
    file = folder / "a" / "1.png"
    sources = Sources(Folder(folder))
    before = sources.stamp(1)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert sources.changed() == [str(file)] and Sources(Folder(folder)).stamp(1) != before


def test_reading_ahead():
    """Two batches are started while one is worked on, and no more; each comes with its key."""
    started = []

    def load(index):
        started.append(index)
        return -index

    with closing(read_ahead(((f"b{n}", [n]) for n in range(6)), load, 1)) as batches:
        assert not started
        assert next(batches) == ("b0", [0])
        assert next(batches) == ("b1", [-1]) and set(started) <= {0, 1, 2, 3}
    assert set(started) <= {0, 1, 2, 3}
    assert list(read_ahead([("a", [1, 2]), ("b", [])], abs, 2)) == [("a", [1, 2]), ("b", [])]


def test_folders_are_checked(folder):
    EvaluationData(str(folder)).check(label="cls")
    (folder.parent / "texts").mkdir()
    (folder.parent / "texts" / "a.md").write_text("")
    with pytest.raises(
        DataError, match=r"^train_data: no pictures in .*/texts or below it.* It holds 1 other files \(a.md\)"
    ):
        EvaluationData(str(folder.parent / "texts"), option="train_data").check()
    with pytest.raises(DataError, match=r"^data: .*/dato does not exist\. Did you mean 'data'\?"):
        EvaluationData(str(folder.parent / "dato")).check()
