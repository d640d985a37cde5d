"""Random resized crops of 8-bit pictures."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

TRIES = 10


def crop_boxes(
    views: int,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Draw ``views`` boxes (top, left, height, width), int64 [views, 4], by the rule of RandomResizedCrop.

    Area a share of the picture uniform in ``scale``, aspect (width / height) log-uniform in ``ratio``; what fits
    in none of ten tries is the largest centred box with an aspect inside ``ratio``. Forty uniform numbers a view.
    """
    uniform = rng.random((views, TRIES, 4))
    area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform[..., 0])
    aspect = np.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * uniform[..., 1])
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = (np.arange(views), fits.argmax(axis=1))
    h, w = h[first], w[first]
    top = np.floor(uniform[..., 2][first] * (height - h + 1))
    left = np.floor(uniform[..., 3][first] * (width - w + 1))
    boxes = np.stack([top, left, h, w], axis=1).astype(np.int64)
    boxes[~fits.any(axis=1)] = centre_box(height, width, ratio)
    return boxes


def centre_box(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    """The largest centred box (top, left, height, width) with an aspect inside ``ratio``."""
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def resized_crops(image: Tensor, boxes: NDArray[np.int64], size: int) -> Tensor:
    """Cut ``boxes`` [V, 4] out of a uint8 picture [3, H, W] and resize them: uint8 [V, 3, size, size].

    Bicubic with antialias on 8-bit values; fastest for pictures laid out channels-last in memory.
    """
    views = [image[None, :, top : top + h, left : left + w] for top, left, h, w in boxes.tolist()]
    return torch.cat([F.interpolate(view, size=(size, size), mode="bicubic", antialias=True) for view in views])


def check_crops(prefix: str, size: int, scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    """Raise ValueError for a size below 1, an area outside 0..1 or a range that runs backwards."""
    start = f"{prefix}_" if prefix else ""
    if size < 1:
        raise ValueError(f"{start}size: {size} is no size in pixels")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"{start}scale: {list(scale)} is not a range of area shares between 0 and 1")
    check_span("crops_ratio" if prefix else "ratio", ratio, "aspect ratios", most=1000)


def check_span(option: str, span: tuple[float, float], what: str, *, most: float) -> None:
    """Raise ValueError for a range that runs backwards or leaves 1 / ``most`` .. ``most``."""
    if not 1 / most <= span[0] <= span[1] <= most:
        raise ValueError(f"{option}: {list(span)} is not a range of {what} from {1 / most:g} to {most:g}")


def check_ranges(*, most: float = 1, **options: float | tuple[float, ...]) -> None:
    """Raise ValueError for an option with a value outside 0..``most``."""
    for option, values in options.items():
        for value in values if isinstance(values, tuple) else (values,):
            if not 0 <= value <= most:
                bounds = f"not between 0 and {most}" if most < math.inf else "below 0"
                raise ValueError(f"{option}: {value} is {bounds}")
