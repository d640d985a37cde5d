"""The nearest-neighbour evaluator on real shards."""

import pytest

from cosmos_ssl.api import DataError
from cosmos_ssl_plugins.evaluators.knn import KNearestNeighbours


def test_labels_pictures_by_their_neighbours(encoder, spec, write_shard):
    train = write_shard("train.tar", [("red", {"cls": "5"}), ("green", {"cls": "green"}), ("blue", {"cls": "6"})] * 4)
    test = write_shard(
        "test.tar",
        [("red", {"cls": "5"}), ("green", {"cls": "green"}), ("blue", {"cls": "5"}), ("red", {"cls": "new"})],
    )
    found = KNearestNeighbours(spec, train_data=train, data=test, k=3).evaluate(encoder, pictures=True)
    assert found.metrics["top1"] == pytest.approx(2 / 4)
    assert found.pictures["neighbours"].shape[0] == 3
    assert KNearestNeighbours.modalities == ("image",)


def test_labels_that_never_meet(encoder, spec, write_shard, caplog):
    train = write_shard("train.tar", [("red", {"cls": "0"}), ("blue", {"cls": "1"})])
    some = write_shard("some.tar", [("red", {"cls": "0"}), ("blue", {"cls": "blue"})])
    assert KNearestNeighbours(spec, train_data=train, data=some, k=1).evaluate(encoder).metrics["top1"] == 1 / 2
    assert (
        "1 of 2 labels are known: 'blue' are none of the training samples', and their samples cannot be found"
        in caplog.text
    )
    none = write_shard("none.tar", [("red", {"cls": "red"}), ("blue", {"cls": "blue"})])
    with pytest.raises(
        DataError, match=r"^0 of 2 labels are known: 'red', 'blue' are none of the training samples', which are 0, 1$"
    ):
        KNearestNeighbours(spec, train_data=train, data=none, k=1).evaluate(encoder)


def test_faults(encoder, spec, write_shard):
    shard = write_shard("a.tar", [("red", {"json": {"kind": ["list"]}})])
    with pytest.raises(DataError, match=r"^train_data: .*nothing.tar does not exist"):
        KNearestNeighbours(spec, train_data="nothing.tar", data=shard).prepare()
    with pytest.raises(DataError, match=r"sample 0000 has no label 'cls'. It has: kind"):
        KNearestNeighbours(spec, train_data=shard, data=shard).evaluate(encoder)
    with pytest.raises(DataError, match=r"has a list or a table where a label is due"):
        KNearestNeighbours(spec, train_data=shard, data=shard, label="kind").evaluate(encoder)
