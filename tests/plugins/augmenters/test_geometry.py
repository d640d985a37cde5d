"""Crop boxes against the rule of RandomResizedCrop; resizing against torchvision and PIL."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from cosmos_ssl_plugins.augmenters.geometry import TRIES, check_crops, crop_boxes, resized_crops

RATIO = (3 / 4, 4 / 3)


def one_by_one(
    uniform: NDArray[np.float64], height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """The rule in plain steps, from the uniform numbers of one view [10, 4]."""
    for u in uniform:
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u[0])
        aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * u[1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(w / ratio[0])
    elif width / height > ratio[1]:
        w = round(h * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(("height", "width"), [(427, 640), (64, 64), (20, 300), (300, 20), (1, 1), (3, 2)])
@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4), (0.9, 1.0)])
def test_boxes_follow_the_rule(height: int, width: int, scale: tuple[float, float]) -> None:
    boxes = crop_boxes(200, height, width, scale, RATIO, np.random.default_rng(0))
    uniform = np.random.default_rng(0).random((200, TRIES, 4))
    assert boxes.tolist() == [list(one_by_one(u, height, width, scale, RATIO)) for u in uniform]
    top, left, h, w = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (h > 0).all() and (w > 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()


@pytest.mark.parametrize(("height", "width"), [(20, 300), (300, 20)])
def test_what_never_fits_falls_back_as_torchvision_does(height: int, width: int) -> None:
    boxes = crop_boxes(5, height, width, (0.9, 1.0), RATIO, np.random.default_rng(0))
    expected = RandomResizedCrop.get_params(torch.zeros(3, height, width), [0.9, 1.0], list(RATIO))
    assert boxes.tolist() == [list(expected)] * 5


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
def test_boxes_have_torchvisions_distribution(scale: tuple[float, float]) -> None:
    """Means and quartiles of position, size and aspect of 4,000 boxes of each."""
    torch.manual_seed(0)
    blank = torch.empty(3, 427, 640, device="meta")
    theirs = np.array([RandomResizedCrop.get_params(blank, list(scale), list(RATIO)) for _ in range(4000)])
    ours = crop_boxes(4000, 427, 640, scale, RATIO, np.random.default_rng(0))
    for values in (
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 2] * b[:, 3] / (427 * 640),
        lambda b: b[:, 3] / b[:, 2],
    ):
        a, b = values(ours), values(theirs)
        spread = b.std()
        assert abs(a.mean() - b.mean()) < 0.1 * spread
        assert np.abs(np.quantile(a, [0.25, 0.5, 0.75]) - np.quantile(b, [0.25, 0.5, 0.75])).max() < 0.15 * spread


@pytest.mark.parametrize("size", [24, 96, 300])
def test_resizing_equals_torchvision_and_is_near_pil(size: int) -> None:
    """torchvision's bicubic on 8 bits runs the same kernel. PIL's rounds its weights more finely:
    one level, on few values, seldom two (each of the two passes rounds, and the second may amplify)."""
    rough = torch.randint(0, 256, (1, 3, 30, 40), generator=torch.Generator().manual_seed(0)).float()
    smooth = torch.nn.functional.interpolate(rough, size=(240, 320), mode="bicubic")[0].clamp(0, 255).to(torch.uint8)
    image = smooth.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # channels-last, as decoded
    boxes = np.array([[0, 0, 240, 320], [10, 20, 150, 130], [5, 7, 31, 40], [100, 100, 1, 1]])
    ours = resized_crops(image, boxes, size)
    assert ours.shape == (4, 3, size, size) and ours.dtype == torch.uint8 and ours.is_contiguous()
    for view, box in zip(ours, boxes.tolist(), strict=True):
        options = {"size": [size, size], "interpolation": InterpolationMode.BICUBIC, "antialias": True}
        assert torch.equal(view, tv.resized_crop(image, *box, **options))
        pil = tv.pil_to_tensor(tv.resized_crop(tv.to_pil_image(image), *box, **options))
        distance = (view.int() - pil.int()).abs()
        assert distance.max() <= 2 and (distance > 1).float().mean() < 1e-4 and (distance > 0).float().mean() < 0.02


@pytest.mark.parametrize(
    ("size", "scale", "ratio", "message"),
    [
        (0, (0.4, 1.0), RATIO, "global_crops_size: 0"),
        (24, (0.0, 1.0), RATIO, "global_crops_scale"),
        (24, (0.6, 0.4), RATIO, "global_crops_scale"),
        (24, (0.4, 1.1), RATIO, "global_crops_scale"),
        (24, (0.4, 1.0), (2.0, 1.0), "crops_ratio"),
    ],
)
def test_impossible_crops_are_refused(
    size: int, scale: tuple[float, float], ratio: tuple[float, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_crops("global_crops", size, scale, ratio)
