"""Text-cropping's rules: how many sentences, none twice, the repeat rule, fields, single sentences."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from cosmos_ssl.api import BadSample, Sample, Spec, ViewSpec
from cosmos_ssl_plugins.augmenters.text_crop import TextCrop, draw_sentences

SPEC = Spec(embed_dim=8)
MANY = {"raw_caption": [f"r{i}" for i in range(4)], "longIB_captions": [f"l{i}" for i in range(16)]}


def crop(augmenter: TextCrop, seed: int, captions: Any = None) -> dict[str, list[str]]:
    texts = augmenter.crop(
        Sample(key="k", captions=MANY if captions is None else captions), np.random.default_rng(seed)
    )
    return {name: [str(text) for text in group] for name, group in texts.items()}


def test_global_texts_join_one_to_five_sentences_and_local_ones_are_single() -> None:
    augmenter = TextCrop(SPEC)
    assert augmenter.offers() == {"global": ViewSpec(views=2), "local": ViewSpec(views=6)}
    lengths: Counter[int] = Counter()
    firsts: Counter[str] = Counter()
    for seed in range(1000):
        texts = crop(augmenter, seed)
        assert len(texts["global"]) == 2 and len(texts["local"]) == 6 == len(set(texts["local"]))
        for text in texts["global"]:
            parts = text.split(". ")
            assert len(parts) == len(set(parts))
            lengths[len(parts)] += 1
        firsts.update(texts["local"])
    assert set(lengths) == {1, 2, 3, 4, 5}
    assert all(abs(count - 400) < 5 * 400**0.5 for count in lengths.values())
    assert len(firsts) == 20 and all(abs(count - 300) < 5 * 300**0.5 for count in firsts.values())


def test_consecutive_sentences() -> None:
    """Runs of every place and length, as often as asked for."""
    captions = {"txt": list("abcdefgh")}
    always, half, never = (TextCrop(SPEC, max_sentences=3, consecutive_prob=p) for p in (1.0, 0.5, 0.0))
    runs = ["abcdefgh"[i : i + count] for count in (1, 2, 3) for i in range(9 - count)]
    joined = [
        [text.replace(". ", "") for seed in range(400) for text in crop(augmenter, seed, captions)["global"]]
        for augmenter in (always, half, never)
    ]
    shares = [sum(text in runs for text in texts if len(text) == 3) for texts in joined]
    assert set(joined[0]) == set(runs) and shares[0] > shares[1] > shares[2] > 0
    assert shares[1] / shares[0] == pytest.approx(0.5, abs=0.15) and shares[2] / shares[0] < 0.1


def test_repeat_rule() -> None:
    """The whole list as often as it fits, then a draw for the rest."""
    rng = np.random.default_rng(0)
    assert draw_sentences(["a", "b", "c"], 0, rng) == []
    assert draw_sentences(["a"], 3, rng) == ["a", "a", "a"]
    assert draw_sentences(["a", "b"], 4, rng) == ["a", "b", "a", "b"]
    rests = set()
    for _ in range(60):
        drawn = draw_sentences(["a", "b", "c"], 8, rng)
        assert drawn[:6] == ["a", "b", "c", "a", "b", "c"] and len(set(drawn[6:])) == 2
        rests.add(tuple(drawn[6:]))
    assert len(rests) == 6
    assert {tuple(draw_sentences(["a", "b", "c"], 2, rng)) for _ in range(60)} == rests


def test_one_sentence_only() -> None:
    texts = crop(TextCrop(SPEC, max_sentences=3), 0, {"txt": ["a cat"]})
    assert texts["local"] == ["a cat"] * 6
    assert set(texts["global"]) <= {"a cat", "a cat. a cat", "a cat. a cat. a cat"}


def test_sentences_with_their_own_full_stop_get_no_other() -> None:
    captions = {"txt": ["It is red.", "It is plain!", "A toy"]}
    texts = [text for seed in range(20) for text in crop(TextCrop(SPEC, max_sentences=3), seed, captions)["global"]]
    assert "It is red. It is plain! A toy" in texts and not any(pair in text for text in texts for pair in ("..", "!."))


@pytest.mark.parametrize(("count", "groups"), [(1, {"global": 1}), (2, {"global": 2}), (3, {"global": 2, "local": 1})])
def test_few_texts(count: int, groups: dict[str, int]) -> None:
    augmenter = TextCrop(SPEC, num_sampled_captions=count)
    assert {name: view.views for name, view in augmenter.offers().items()} == groups
    assert {name: len(texts) for name, texts in crop(augmenter, 0).items()} == groups


def test_single_sentences_without_joining() -> None:
    """All eight texts together are one draw: none twice."""
    for seed in range(50):
        texts = crop(TextCrop(SPEC, join=False), seed)
        drawn = texts["global"] + texts["local"]
        assert len(texts["global"]) == 2 and len(set(drawn)) == 8 and not any(". " in text for text in drawn)


def test_only_the_fields_asked_for() -> None:
    texts = crop(TextCrop(SPEC, caption_fields=["raw_caption", "absent"], join=False, num_sampled_captions=4), 0)
    assert sorted(texts["global"] + texts["local"]) == MANY["raw_caption"]


def test_same_generator_same_texts() -> None:
    augmenter = TextCrop(SPEC)
    assert crop(augmenter, 3) == crop(augmenter, 3) != crop(augmenter, 4)


@pytest.mark.parametrize("captions", [{}, {"txt": []}, {"txt": ["", "  \n"]}])
def test_no_caption_is_a_bad_sample(captions: dict[str, list[str]]) -> None:
    with pytest.raises(BadSample, match="no caption"):
        crop(TextCrop(SPEC), 0, captions)


def test_a_field_without_sentences_is_a_bad_sample() -> None:
    with pytest.raises(BadSample, match="no caption"):
        crop(TextCrop(SPEC, caption_fields=["shortIB_captions"]), 0)


@pytest.mark.parametrize(
    "options", [{"num_sampled_captions": 0}, {"num_global_captions": 0}, {"max_sentences": 0}, {"caption_fields": []}]
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        TextCrop(SPEC, **options)
