"""Groups of texts by caption fields: what is drawn of which, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from cosmos_ssl.api import BadSample, Sample, Spec, ViewSpec
from cosmos_ssl_plugins.augmenters.text_groups import TextGroups, TextViews

SPEC = Spec(embed_dim=8)
ALT, SAID = TextViews(caption_fields=["raw"]), TextViews(caption_fields=["long"], number=2, max_sentences=3)
SAMPLE = Sample(key="k", captions={"raw": ["alt"], "long": [f"s{i}" for i in range(6)]})


def test_each_group_draws_from_its_fields_whatever_others_do() -> None:
    both, alone = TextGroups(SPEC, groups={"global": ALT, "said": SAID}), TextGroups(SPEC, groups={"said": SAID})
    assert both.offers() == {"global": ViewSpec(views=1), "said": ViewSpec(views=2)}
    counts = set()
    for seed in range(40):
        texts = both.crop(SAMPLE, np.random.default_rng(seed))
        assert texts["global"] == ["alt"] and len(texts["said"]) == 2
        assert texts["said"] == alone.crop(SAMPLE, np.random.default_rng(seed))["said"]
        for text in texts["said"]:
            parts = text.split(". ")
            assert len(set(parts)) == len(parts) and set(parts) <= set(SAMPLE.captions["long"])
            counts.add(len(parts))
    assert counts == {1, 2, 3}


def test_what_is_refused() -> None:
    with pytest.raises(BadSample, match="no caption for the texts 'said'"):
        TextGroups(SPEC, groups={"global": ALT, "said": SAID}).crop(
            Sample(key="k", captions={"raw": ["alt"], "long": [" "]}), np.random.default_rng(0)
        )
    with pytest.raises(ValueError, match="groups: no group is left"):
        TextGroups(SPEC, groups={"global": None})
    with pytest.raises(ValueError, match=r"groups.a.caption_fields: an empty list"):
        TextGroups(SPEC, groups={"a": TextViews(caption_fields=[])})
