"""Batches: from crops to views, and to the device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cosmos_ssl.api import CropGroup, ImageGroup, TextGroup, Views
from cosmos_ssl.api.views import CroppedViews
from cosmos_ssl.models.contract import Fault, checked_pixels

CROPS = CropGroup(
    pixels=torch.zeros(2, 3, 3, 8, 8, dtype=torch.uint8), params=torch.rand(2, 3, 4), masks=torch.rand(2, 3, 5) > 0.5
)
BATCH = CroppedViews(
    keys=["a", "b", "c"],
    image={"global": CROPS},
    text={"local": TextGroup(tokens=torch.arange(12).view(1, 3, 4), lengths=torch.full((1, 3), 4))},
    extras={"cls": [1, 2, 3], "box": [torch.zeros(4)] * 3},
)


def test_what_is_read_on_the_host_stays_there() -> None:
    moved = BATCH.to("meta")
    assert isinstance(moved, CroppedViews) and moved.device.type == "meta"
    image, text = moved.image["global"], moved.text["local"]
    assert image.pixels.is_meta and text.tokens.is_meta and all(box.is_meta for box in moved.extras["box"])
    assert image.params is CROPS.params and image.masks is CROPS.masks
    assert text.lengths is BATCH.text["local"].lengths and moved.extras["cls"] == [1, 2, 3]


def test_a_slice_holds_some_samples() -> None:
    part = BATCH.slice(1, 3)
    assert isinstance(part, CroppedViews) and list(part.keys) == ["b", "c"] and len(part) == 2
    assert torch.equal(part.image["global"].params, CROPS.params[:, 1:])
    assert torch.equal(part.of("text")["local"].tokens, BATCH.text["local"].tokens[:, 1:])  # type: ignore[union-attr]
    assert part.extras["cls"] == [2, 3]
    with pytest.raises(ValueError, match="group 'global' holds 3 samples, the batch 2"):
        Views(keys=["a", "b"], image={"global": CROPS.finished(CROPS.pixels / 255)})


def test_finished_crops_are_views_however_they_were_made() -> None:
    """Also as augmenters made them before crops had a type of their own."""
    pixels = CROPS.pixels / 255
    without = ImageGroup(pixels=pixels, params=CROPS.params)
    for given in (CROPS.finished(pixels), replace(CROPS, pixels=pixels), without):
        found = checked_pixels(CROPS, given)
        assert type(found) is ImageGroup and found.pixels is pixels and found.params is CROPS.params
        assert found.masks is given.masks
    for wrong in (CROPS, CROPS.finished(CROPS.pixels), pixels):
        with pytest.raises(Fault, match="finish returned"):
            checked_pixels(CROPS, wrong)
