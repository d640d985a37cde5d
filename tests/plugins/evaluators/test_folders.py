"""The evaluators on folders of pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from cosmos_ssl.api import DataError
from cosmos_ssl_plugins.datasets.image_folder import ImageFolder
from cosmos_ssl_plugins.evaluators.classification import Classification
from cosmos_ssl_plugins.evaluators.knn import KNearestNeighbours
from cosmos_ssl_plugins.evaluators.retrieval import Retrieval

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write pictures: a path from the folder and the colour of each; None is a broken picture."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))

    def write(name: str, pictures: dict[str, str | None]) -> str:
        for path, colour in pictures.items():
            file = tmp_path / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            if colour is None:
                file.write_bytes(b"no picture")
            else:
                Image.new("RGB", (10, 9), COLOURS[colour]).save(file)
        return str(tmp_path / name)

    return write


def test_neighbours_by_the_names_of_classes(encoder, spec, write):
    """Class 1 of the held-out folder is class 2 of the training folder."""
    train = write("train", {"blue/1.png": "blue", "green/1.png": "green", "red/1.png": "red", "red/2.png": "red"})
    val = write("val", {"blue/9.png": "blue", "red/deep/7.jpg": "red", "red/8.png": "green", "red/x.png": None})
    evaluator = KNearestNeighbours(spec, train_data=train, data=val, k=1)
    evaluator.prepare()
    assert evaluator.evaluate(encoder, pictures=True).metrics == pytest.approx(
        {"top1": 2 / 3, "top5": 1, "mean_per_class_top1": 3 / 4}
    )
    by_name = KNearestNeighbours(spec, train_data=train, data=val, k=1, label="class_name")
    assert by_name.evaluate(encoder).metrics["top1"] == pytest.approx(2 / 3)
    of_the_set = KNearestNeighbours(replace(spec, validation_data=val), train_data=train, k=1)
    assert of_the_set.evaluate(encoder).metrics["top1"] == pytest.approx(2 / 3)


def test_neighbours_refuse(encoder, spec, write):
    train = write("train", {"blue/1.png": "blue", "red/1.png": "red"})
    flat = write("flat", {"1.png": "blue"})
    with pytest.raises(
        DataError, match=r"^data: .*/val: the class folder 'rad' is none of the 2 known classes\. Did you mean 'red'\?"
    ):
        KNearestNeighbours(spec, train_data=train, data=write("val", {"rad/1.png": "red"})).prepare()
    with pytest.raises(DataError, match=r"^train_data: sample 1.png has no label 'cls'\. It has: none"):
        KNearestNeighbours(spec, train_data=flat, data=train).prepare()
    with pytest.raises(
        DataError, match=r"^train_data: sample blue/1.png has no label 'kind'\. It has: class_name, cls"
    ):
        KNearestNeighbours(spec, train_data=train, data=train, label="kind").prepare()
    with pytest.raises(DataError, match=r"^data: .*/trian does not exist\. Did you mean 'train'\?"):
        KNearestNeighbours(spec, train_data=train, data=train.replace("train", "trian")).prepare()
    with pytest.raises(DataError, match=r"^data: .* is a folder: pictures are read from one folder alone"):
        KNearestNeighbours(spec, train_data=train, data=[flat, train]).prepare()


def test_a_folder_beside_shards(encoder, spec, write, write_shard):
    """Numbers of folders and numbers in shards are taken for the same."""
    shard = write_shard("train.tar", [("blue", {"cls": "0"}), ("red", {"cls": "1"})])
    val = write("val", {"blue/1.png": "blue", "red/1.png": "red"})
    assert KNearestNeighbours(spec, train_data=shard, data=val, k=1).evaluate(encoder).metrics["top1"] == 1
    assert KNearestNeighbours(spec, train_data=val, data=shard, k=1).evaluate(encoder).metrics["top1"] == 1


def test_classes_are_called_as_their_folders(encoder, spec, write):
    val = write("val", {"red/1.png": "red", "green/1.png": "green", "blue/1.png": "blue", "blue/2.png": "green"})
    evaluator = Classification(spec, data=val, templates="a {}")
    evaluator.prepare()
    found = evaluator.evaluate(encoder, pictures=True)
    assert found.metrics == pytest.approx({"top1": 3 / 4, "top5": 1, "mean_per_class_top1": 5 / 6})
    assert (
        Classification(spec, data=val, templates="a {}", label="class_name").evaluate(encoder).metrics["top1"] == 3 / 4
    )
    (Path(val) / "classes.txt").write_text("red\nyellow\ngreen\nblue\n")  # found by name, in any order
    assert Classification(spec, data=val, templates="a {}").evaluate(encoder).metrics["top1"] == 3 / 4
    (Path(val) / "classes.txt").write_text("a blue\na red\na green\n")  # other words, so in the order of the folders
    assert Classification(spec, data=val, templates="{}").evaluate(encoder).metrics["top1"] == 1 / 4
    (Path(val) / "classes.txt").write_text("red\ngreen\nyellow\n")
    with pytest.raises(DataError, match=r"classes.txt: name 1, 'red', stands in the place of the class folder 'blue'"):
        Classification(spec, data=val, templates="a {}").prepare()
    with pytest.raises(DataError, match=r"^class_names: 2 class names are given for 3 classes"):
        Classification(spec, data=val, templates="a {}", class_names=["a", "b"]).prepare()
    with pytest.raises(DataError, match=r"^class_names: give them"):  # WordNet numbers are no words
        Classification(spec, data=write("wordnet", {"n01440764/1.png": "red", "n01443537/1.png": "blue"})).prepare()
    with pytest.raises(DataError, match=r"^data: sample 1.png has no label 'cls'"):
        Classification(spec, data=write("flat", {"1.png": "red"}), class_names=["red", "blue"]).prepare()


def test_retrieval_by_the_texts_beside_pictures(encoder, spec, write):
    data = write("flat", {"1.png": "red", "2.png": "green", "3.png": "blue", "4.png": "yellow"})
    for name, text in (("1", "a red one"), ("2", "a green one"), ("3", "a red one, too")):
        (Path(data) / f"{name}.txt").write_text(text)
    evaluator = Retrieval(spec, data=data)
    evaluator.prepare()
    found = evaluator.evaluate(encoder)
    assert found.metrics["image_to_text_R@1"] == pytest.approx(2 / 3)  # the one without a text is left out


def test_splits_are_no_classes(encoder, spec, write):
    """Of a folder with train/ and val/ one is learned from and the other is evaluated on."""
    root = write(
        "all", {"train/red/1.png": "red", "train/blue/1.png": "blue", "val/red/1.png": "red", "val/blue/1.png": "red"}
    )
    evaluator = KNearestNeighbours(spec, train_data=root, data=root, k=1)
    evaluator.prepare()
    assert (
        evaluator.train_data.class_names == ("blue", "red")
        and len(evaluator.train_data.samples) == len(evaluator.data.samples) == 2
    )
    assert evaluator.evaluate(encoder).metrics["top1"] == 1 / 2
    with pytest.raises(DataError, match=r"all holds train/ and val/: splits, no classes\. Name one: .*all/train"):
        ImageFolder(spec, train_data=root).prepare()
    ImageFolder(spec, train_data=f"{root}/train").prepare()
