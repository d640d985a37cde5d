"""One random resized crop a picture, without photometric changes: the views of CLIP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch

from cosmos_ssl.api import (
    Augmenter,
    CropGroup,
    ImageCrops,
    ImageGroup,
    Modality,
    Pixels,
    Sample,
    Spec,
    TowerSpec,
    ViewSpec,
)
from cosmos_ssl_plugins.augmenters.geometry import check_crops, crop_boxes, resized_crops
from cosmos_ssl_plugins.augmenters.photometric import mirror, standardise


class ResizeCrop(Augmenter):
    """Group ``global`` of one square view (arXiv 2103.00020; OpenCLIP's default scale and ratio).

    ``size``: side of the view, in pixels.
    ``scale``, ``ratio``: ranges of the crop's area, as a share of the picture, and of its width over its height.
    ``flip``: mirror every other view, on average.
    """

    modality: ClassVar[Modality] = "image"

    def __init__(
        self,
        spec: Spec,
        *,
        size: Pixels = 224,
        scale: tuple[float, float] = (0.9, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = False,
    ) -> None:
        check_crops("", size, scale, ratio)
        tower = spec.image or TowerSpec(width=0)
        self.kernels = spec.kernels
        self.mean, self.std = tower.mean, tower.std
        self.size, self.scale, self.ratio, self.flip = size, scale, ratio, flip

    def offers(self) -> Mapping[str, ViewSpec]:
        """``global``, one view."""
        return {"global": ViewSpec(views=1, size=self.size)}

    def crop(self, sample: Sample, rng: np.random.Generator) -> Mapping[str, ImageCrops]:
        """The crop, uint8 [1, 3, size, size]; with ``flip`` one parameter, 1 for a mirrored view, else none."""
        image = sample.decode()
        boxes = crop_boxes(1, image.shape[1], image.shape[2], self.scale, self.ratio, rng)
        params = torch.full((1, 1), float(rng.random() < 0.5)) if self.flip else torch.empty(1, 0)
        return {"global": ImageCrops(pixels=resized_crops(image, boxes, self.size), params=params)}

    def finish(self, group: CropGroup) -> ImageGroup:
        """uint8 [1, B, 3, H, W] to normalised float32 of the same shape."""
        pixels = standardise(group.pixels, self.mean, self.std, self.kernels)
        if self.flip:
            mirror(pixels.flatten(0, 1), group.params.flatten())
        return group.finished(pixels)
