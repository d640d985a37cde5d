"""The data of evaluators: which samples are read, in what order, what is told of bad ones."""

import logging

import pytest
import torch
from PIL import Image

from cosmos_ssl.api import DataError
from cosmos_ssl.evaluation.samples import EvaluationData


class Small:
    """The part of an encoder that reading needs."""

    def preprocess(self, image):
        return image[:, :4, :4].float()


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


def test_batches_of_a_folder_are_sorted(folder, caplog):
    data = EvaluationData(str(folder), workers=2)
    with caplog.at_level(logging.WARNING):
        batches = list(data.batches(Small(), 4))
    assert [batch.pixels[:, 0, 0, 0].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert [sample.extras["cls"] for batch in batches for sample in batch.samples] == [0] * 6 + [1] * 3
    assert "1 of 10 samples left out of the evaluation (1 undecodable)" in caplog.text
    assert data.class_names == ("a", "b") and data.folder == folder
    assert torch.equal(data.read(batches[1].indices[2]).decode()[:, 0, 0], torch.full((3,), 6, dtype=torch.uint8))


def test_evenly_spread_samples_come_from_all_classes(folder):
    (batch,) = EvaluationData([str(folder)], max_samples=3).batches(Small(), 8)
    assert [sample.key for sample in batch.samples] == ["a/0.png", "a/4.png"]  # the third is the broken one


def test_folders_are_checked(folder):
    EvaluationData(str(folder)).check(label="cls")
    (folder.parent / "texts").mkdir()
    (folder.parent / "texts" / "a.md").write_text("")
    with pytest.raises(DataError, match=r"^train_data: no pictures in .*/texts or below it.* It holds 1 other files \(a.md\)"):
        EvaluationData(str(folder.parent / "texts"), option="train_data").check()
    with pytest.raises(DataError, match=r"^data: .*/dato does not exist\. Did you mean 'data'\?"):
        EvaluationData(str(folder.parent / "dato")).check()
