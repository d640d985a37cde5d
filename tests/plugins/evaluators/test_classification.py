"""The zero-shot classification evaluator on real shards."""

import pytest

from cosmos_ssl.api import DataError
from cosmos_ssl_plugins.evaluators.classification import Classification

NAMES = ["red", "green", "blue"]


def test_top1(encoder, spec, write_shard):
    shard = write_shard(
        "a.tar", [("red", {"cls": "0"}), ("blue", {"cls": "2"}), ("green", {"cls": "2"}), ("blue", {"cls": "2"})]
    )
    found = Classification(spec, data=shard, class_names=NAMES, templates=["a {}", "one {}"]).evaluate(
        encoder, pictures=True
    )
    assert found.metrics == pytest.approx({"top1": 3 / 4, "top5": 1, "mean_per_class_top1": 5 / 6})
    assert list(found.pictures) == ["classes"]


def test_names_beside_the_shards_and_labels_by_name(encoder, spec, write_shard, tmp_path):
    shard = write_shard("a.tar", [("red", {"json": {"kind": "red"}}), ("green", {"json": {"kind": 1}})])
    evaluator = Classification(spec, data=shard, label="kind")
    with pytest.raises(
        DataError, match=r"class_names: give them, since none of classes.txt, classnames.txt lies beside .*a.tar"
    ):
        evaluator.prepare()
    (tmp_path / "classnames.txt").write_text("red\ngreen\n")
    evaluator.prepare()
    assert evaluator.evaluate(encoder).metrics["top1"] == 1


def test_faults(encoder, spec, write_shard):
    shard = write_shard("a.tar", [("red", {"cls": "7"})])
    with pytest.raises(DataError, match="sample 0000 has the label '7', which is none of the 3 class names"):
        Classification(spec, data=shard, class_names=NAMES).evaluate(encoder)
    with pytest.raises(DataError, match=r"sample 0000 has no label 'kind'. It has: cls"):
        Classification(spec, data=shard, class_names=NAMES, label="kind").evaluate(encoder)
    with pytest.raises(ValueError, match=r"^templates: 'photo' has no {}"):
        Classification(spec, data=shard, class_names=NAMES, templates="photo")
    with pytest.raises(ValueError, match=r"^class_names: nowhere.txt cannot be read"):
        Classification(spec, data=shard, class_names="nowhere.txt")


def test_equal_names_are_told_and_the_first_counts(encoder, spec, write_shard, caplog):
    """Of two classes of one name the first gets the pictures of both, as in top-k of published figures."""
    shard = write_shard("a.tar", [("red", {"cls": "0"}), ("red", {"cls": "2"}), ("blue", {"cls": "1"})])
    evaluator = Classification(spec, data=shard, class_names=["red", "blue", "red"])
    evaluator.prepare()
    assert "'red' is the name of classes 0 and 2: their scores are equal" in caplog.text
    assert evaluator.evaluate(encoder).metrics == pytest.approx(
        {"top1": 2 / 3, "top5": 1, "mean_per_class_top1": 2 / 3}
    )
