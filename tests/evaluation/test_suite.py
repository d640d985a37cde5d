"""Which tasks there is data for: sets in a folder and directly below it, each once."""

import pytest

from cosmos_ssl.api import DataError
from cosmos_ssl.evaluation.suite import Item, find_all


def test_sets_are_found_once_in_the_order_of_the_tasks(tmp_path):
    """The linear probe is of the ten sets with a training split alone: not of SUN397, nor of ImageNet-A."""
    for folder in (
        "cifar-10-batches-py",
        "b/cifar-10-batches-py",
        "b/SUN397",
        "imagenet-a",
        "m/MLLM_VLM Images",
        "c/d",
    ):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("b/SUN397/ClassName.txt", "m/Questions.csv", "c/d/examples.jsonl"):
        (tmp_path / file).touch()
    assert find_all(tmp_path) == [
        Item("classification", "cifar10", tmp_path),
        Item("classification", "imagenet_a", tmp_path),
        Item("classification", "sun397", tmp_path / "b"),
        Item("linear_probe", "cifar10", tmp_path),
        Item("mmvp", None, tmp_path / "m"),
    ]
    assert find_all(tmp_path / "c") == [Item("winoground", None, tmp_path / "c/d")]
    with pytest.raises(DataError, match="is no folder"):
        find_all(tmp_path / "m/Questions.csv")
    with pytest.raises(DataError, match="holds a set that is known"):
        find_all(tmp_path / "m/MLLM_VLM Images")
