"""The health evaluator on real shards: its numbers are the formulas', and a collapse is told in one sentence."""

import io

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from cosmos_ssl.api import DataError, Spec, TowerSpec
from cosmos_ssl.evaluation.health import alignment, effective_rank, match_entropy, uniformity
from cosmos_ssl_plugins.evaluators.health import Health

TEXT = Spec(embed_dim=3, text=TowerSpec(width=3))


def samples(*colours):
    return [(colour, {"txt": f"a {colour} thing"}) for colour in colours]


def test_numbers(encoder, write_shard, caplog):
    """Picture and text of a colour are equal; the one without a text is left out."""
    encoder.logit_scale = 3.0
    data = write_shard("a.tar", [*samples("red", "green", "blue"), ("yellow", {"json": {}})])
    found = Health(TEXT, data=data).evaluate(encoder).metrics
    colours = torch.eye(3)
    assert found == pytest.approx(
        {
            **{f"{name}_effective_rank": effective_rank(colours) for name in ("tower", "image", "text")},
            **{f"{name}_uniformity": uniformity(colours) for name in ("image", "text")},
            "alignment": alignment(colours, colours),
            "match_entropy": match_entropy(colours, colours, 3.0),
        },
        abs=1e-5,
    )
    assert "collapse" not in caplog.text


def test_without_text_a_pair_is_a_picture_and_its_mirror_image(encoder, write_shard, monkeypatch):
    """A model that sees the left edge alone: red there, green at the right one, which are at right angles."""
    edge = lambda self, pixels, normalize=True: F.normalize(pixels[:, :, 0, 0], dim=1)  # noqa: E731
    monkeypatch.setattr(type(encoder), "encode_image", edge)
    halves = Image.new("RGB", (10, 9), (255, 0, 0))
    halves.paste((0, 255, 0), (4, 0, 10, 9))
    halves.save(file := io.BytesIO(), "png")
    data = write_shard("a.tar", [("red", {"png": file.getvalue()}), *samples("blue")])
    found = Health(Spec(embed_dim=3), data=data).evaluate(encoder).metrics
    assert set(found) == {"tower_effective_rank", "image_effective_rank", "image_uniformity", "alignment"}
    assert found["alignment"] == pytest.approx(1)  # the mean of 2 and 0


def test_collapse_is_told(encoder, write_shard, caplog):
    found = Health(TEXT, data=write_shard("a.tar", samples(*["red"] * 30)), collapsed=0.5).evaluate(encoder)
    assert found.metrics["image_effective_rank"] == pytest.approx(1, abs=1e-3)
    assert (
        "features collapse: their effective rank is tower 1.0 of 3, image 1.0 of 3, text 1.0 of 3; lower" in caplog.text
    )
    with pytest.raises(DataError, match="1 samples can be used"):
        Health(TEXT, data=write_shard("b.tar", samples("red"))).evaluate(encoder)
