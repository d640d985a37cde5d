"""The retrieval evaluator on real shards."""

from dataclasses import replace

import pytest
import torch

from cosmos_ssl.api import DataError
from cosmos_ssl_plugins.evaluators.retrieval import Retrieval


def samples(*colours, **more):
    return [
        (
            colour,
            {"txt": f"a {colour} thing", "json": {"short": [f"{colour}"], "long": [f"so {colour}", "yellow"]}, **more},
        )
        for colour in colours
    ]


def test_finds_colours(encoder, spec, write_shard):
    evaluator = Retrieval(spec, data=write_shard("a.tar", samples("red", "green", "blue")), batch_size=2)
    found = evaluator.evaluate(encoder)
    assert found.metrics["image_to_text_R@1"] == found.metrics["text_to_image_R@1"] == 1
    assert found.metrics["image_to_text_mean_rank"] == 1
    assert not found.pictures


def test_any_text_of_a_list_counts(encoder, spec, write_shard):
    """With two texts an image is found by the better one, while each text is asked by itself."""
    evaluator = Retrieval(spec, data=write_shard("a.tar", samples("red", "green", "blue")), texts="long")
    found = evaluator.evaluate(encoder).metrics
    assert found["image_to_text_R@1"] == 1
    # 'yellow' is nearest to red and green alike (the first of them counts) and never to blue
    assert found["text_to_image_R@1"] == pytest.approx(4 / 6)


def test_bad_and_untold_pictures_are_left_out(encoder, spec, write_shard, caplog):
    mixed = [*samples("red"), (None, {"txt": "a green thing"}), ("blue", {"json": {}}), *samples("green")]
    found = Retrieval(spec, data=write_shard("a.tar", mixed)).evaluate(encoder).metrics
    assert found["image_to_text_R@1"] == 1
    assert "a.tar: 1 of 3 samples have no texts 'txt' (0002); left out" in caplog.text
    assert "a.tar: 1 of 4 pictures cannot be used (0001: undecodable" in caplog.text


def test_pictures(encoder, spec, write_shard):
    pictures = (
        Retrieval(spec, data=write_shard("a.tar", samples("red", "green", "blue")))
        .evaluate(encoder, pictures=True)
        .pictures
    )
    assert list(pictures) == ["matches"]
    picture = pictures["matches"]
    assert picture.dtype == torch.uint8
    assert picture.shape[0] == 3
    corner = picture[:, 20, 20], picture[:, 150, 20]
    assert [c.tolist() for c in corner] == [[255, 0, 0], [0, 255, 0]]


def test_the_list_and_the_rank_of_matches_are_the_metrics(encoder, spec, write_shard, monkeypatch):
    """Four pictures of one colour: of equal scores the earlier text comes first, in the list and in the rank alike."""
    shard = write_shard("a.tar", [("red", {"txt": f"red {n}"}) for n in range(4)])
    drawn = []
    monkeypatch.setattr("cosmos_ssl_plugins.evaluators.retrieval.draw_matches", lambda matches: drawn.extend(matches))
    found = Retrieval(spec, data=shard).evaluate(encoder, pictures=True)
    for n, match in enumerate(drawn):
        assert [(text, own) for text, _, own in match.found] == [(f"red {i}", i == n) for i in range(3)]
        assert match.note == f"own text at rank {n + 1}: red {n}"
    assert found.metrics["image_to_text_mean_rank"] == 2.5


def test_evenly_spread_samples(encoder, spec, write_shard):
    shard = write_shard("a.tar", samples(*["red"] * 5, *["green"] * 5, *["blue"] * 5))
    few = Retrieval(spec, data=shard, max_samples=3).evaluate(encoder).metrics
    assert few["image_to_text_R@1"] == 1  # of fifteen, equal ones would beat one another


def test_validation_shards_of_the_data_set(encoder, spec, write_shard):
    known = replace(spec, validation_data=write_shard("a.tar", samples("red", "blue")))
    assert Retrieval(known).evaluate(encoder).metrics["image_to_text_R@1"] == 1
    Retrieval(replace(spec, validation_data="not-yet-written.tar"))  # a data set that is not prepared


def test_faults(encoder, spec, write_shard, tmp_path):
    with pytest.raises(DataError, match=r"^data: name the shards"):
        Retrieval(spec).prepare()
    with pytest.raises(DataError, match=r"^data: .*none-0000.tar and 1 more do not exist"):
        Retrieval(spec, data=f"{tmp_path}/none-{{0000..0001}}.tar").prepare()
    with pytest.raises(ValueError, match=r"^batch_size: 0"):
        Retrieval(spec, data=write_shard("a.tar", samples("red")), batch_size=0)
    with pytest.raises(ValueError, match=r"^max_samples: 0"):
        Retrieval(spec, data=write_shard("a.tar", samples("red")), max_samples=0)
    with pytest.raises(DataError, match=r"have no texts 'raw'. They have: txt, short, long"):
        Retrieval(spec, data=write_shard("a.tar", samples("red")), texts="raw").evaluate(encoder)
    found = Retrieval(spec, data=write_shard("a.tar", samples("red", "blue")), texts="raw")
    with pytest.raises(
        DataError, match=r"^texts: samples such as 0000 have no texts 'raw'. They have: txt, short, long"
    ):
        found.prepare()  # before training rather than after an epoch of it
    Retrieval(spec, data=write_shard("a.tar", [(None, {"txt": "red"}), ("red", {"txt": "red"})])).prepare()
    with pytest.raises(DataError, match="not one picture can be used"):
        Retrieval(spec, data=write_shard("b.tar", [(None, {"txt": "red"})])).evaluate(encoder)
