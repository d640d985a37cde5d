"""Multi-crop: large global views and small local ones of one picture, each with its own photometric changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np

from cosmos_ssl.api import (
    Augmenter,
    CropGroup,
    Few,
    ImageCrops,
    ImageGroup,
    Modality,
    Pixels,
    Sample,
    Size,
    Spec,
    Strength,
    TowerSpec,
    ViewSpec,
    Whole,
)
from cosmos_ssl_plugins.augmenters.geometry import check_crops, check_ranges, check_span, crop_boxes, resized_crops
from cosmos_ssl_plugins.augmenters.masks import BlockMasks
from cosmos_ssl_plugins.augmenters.photometric import MAX_BLUR, Draw, Strengths, finish


class MultiCrop(Augmenter):
    """Groups ``global`` and ``local`` of square views, as SwAV, DINO and COSMOS cut them (arXiv 2412.01814).

    Workers decode once, cut and resize, and draw the photometric parameters; the device flips, jitters the colours
    (in random order), takes the colour away, blurs, solarises and normalises, all on 8-bit values.

    ``global_crops_number``, ``local_crops_number``: views of each group; without local views there is no such group.
    ``global_crops_size``, ``local_crops_size``: side of the views in pixels.
    ``global_crops_scale``, ``local_crops_scale``: range of the share of the picture that a view covers.
    ``crops_ratio``: range of a crop's width / height before it is resized.
    ``flip_prob``, ``color_jitter_prob``, ``grayscale_prob``: how likely a view is mirrored, changes its colours, loses
    them.
    ``brightness``, ``contrast``, ``saturation``: the jitter's factor is within 1 +- this.
    ``hue``: the jitter's turn of the colour circle is within +- this.
    ``gaussian_blur_probs``, ``solarize_probs``: for the first global view, the other global views and the local views.
    ``gaussian_blur_radius``: range of the blur's standard deviation in pixels.
    ``solarize_threshold``: 8-bit values from here on are inverted.
    ``mask_probability``: how likely a global view carries a mask of its patches, for masked image modelling; 0 draws no
    masks.
    ``mask_ratio``: range of the share of the patches that a mask hides, by blocks (iBOT, arXiv 2111.07832, section
    3.2).
    ``mask_aspect``: range of a block's height / width.
    ``mask_min_patches``: least area of a block in patches, before its sides are rounded.
    ``mask_fill``: single patches fill up a mask if no further block fits. False: the mask hides fewer, and both sides
    of a block are shorter than the view's, as in the programs of iBOT and DINOv2.
    """

    modality: ClassVar[Modality] = "image"

    def __init__(
        self,
        spec: Spec,
        *,
        global_crops_number: Few = 2,
        global_crops_size: Pixels = 224,
        global_crops_scale: tuple[float, float] = (0.4, 1.0),
        local_crops_number: Whole = 6,
        local_crops_size: Pixels = 96,
        local_crops_scale: tuple[float, float] = (0.05, 0.4),
        crops_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip_prob: float = 0.5,
        color_jitter_prob: float = 0.8,
        brightness: Strength = 0.4,
        contrast: Strength = 0.4,
        saturation: Strength = 0.2,
        hue: float = 0.1,
        grayscale_prob: float = 0.2,
        gaussian_blur_probs: tuple[float, float, float] = (1.0, 0.1, 0.5),
        gaussian_blur_radius: tuple[float, float] = (0.1, 2.0),
        solarize_probs: tuple[float, float, float] = (0.0, 0.2, 0.0),
        solarize_threshold: int = 128,
        mask_probability: float = 0.0,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        mask_aspect: tuple[float, float] = (0.3, 1 / 0.3),
        mask_min_patches: Size = 4,
        mask_fill: bool = True,
    ) -> None:
        if global_crops_number < 1:
            raise ValueError(f"global_crops_number: {global_crops_number} leaves no global view; give at least 1")
        if local_crops_number < 0:
            raise ValueError(f"local_crops_number: {local_crops_number} is no number of views")
        check_crops("global_crops", global_crops_size, global_crops_scale, crops_ratio)
        check_crops("local_crops", local_crops_size, local_crops_scale, crops_ratio)
        check_ranges(flip_prob=flip_prob, color_jitter_prob=color_jitter_prob, grayscale_prob=grayscale_prob)
        check_ranges(gaussian_blur_probs=gaussian_blur_probs, solarize_probs=solarize_probs)
        check_ranges(most=math.inf, brightness=brightness, contrast=contrast, saturation=saturation)
        check_ranges(most=0.5, hue=hue)
        check_ranges(most=255, solarize_threshold=solarize_threshold)
        check_span("gaussian_blur_radius", gaussian_blur_radius, "radii", most=MAX_BLUR)
        tower = spec.image or TowerSpec(width=0)
        self.kernels = spec.kernels
        self.mean, self.std = tower.mean, tower.std
        self.ratio = crops_ratio
        first = Strengths(
            flip=flip_prob,
            jitter=color_jitter_prob,
            factors=(brightness, contrast, saturation, hue),
            grey=grayscale_prob,
            blur=gaussian_blur_probs[0],
            blur_radius=gaussian_blur_radius,
            solarize=solarize_probs[0],
            solarize_threshold=solarize_threshold,
        )
        other, local = (replace(first, blur=gaussian_blur_probs[i], solarize=solarize_probs[i]) for i in (1, 2))
        strengths = {"global": [first] + [other] * (global_crops_number - 1), "local": [local] * local_crops_number}
        self._draws = {name: Draw(views) for name, views in strengths.items() if views}
        self._scales = {"global": global_crops_scale, "local": local_crops_scale}
        sizes = {"global": global_crops_size, "local": local_crops_size}
        self._masks = None
        if mask_probability:
            grid = global_crops_size // tower.patch_size if tower.patch_size else 0
            self._masks = BlockMasks(
                grid=grid,
                probability=mask_probability,
                ratio=mask_ratio,
                aspect=mask_aspect,
                min_patches=mask_min_patches,
                fill=mask_fill,
            )
        masked = {"global"} if self._masks else set[str]()
        self._offers = {
            name: ViewSpec(views=len(strengths[name]), size=sizes[name], masks=name in masked) for name in self._draws
        }

    def offers(self) -> Mapping[str, ViewSpec]:
        """``global``, and ``local`` unless its number is 0."""
        return self._offers

    def crop(self, sample: Sample, rng: np.random.Generator) -> Mapping[str, ImageCrops]:
        """Crops as uint8 [V, 3, size, size], their parameter rows and masks, by group.

        Raises BadSample as ``decode`` does.
        """
        image = sample.decode()
        height, width = image.shape[-2:]
        crops = {}
        for name, view in self._offers.items():
            boxes = crop_boxes(view.views, height, width, self._scales[name], self.ratio, rng)
            params = self._draws[name](rng)
            crops[name] = ImageCrops(pixels=resized_crops(image, boxes, view.size or 0), params=params)
        if self._masks is not None:  # last, so that the views are those of a run without masks
            crops["global"] = replace(crops["global"], masks=self._masks(self._offers["global"].views, rng))
        return crops

    def finish(self, group: CropGroup) -> ImageGroup:
        """uint8 [V, B, 3, H, W] to normalised float32 of the same shape."""
        pixels = finish(group.pixels.flatten(0, 1), group.params.flatten(0, 1), self.mean, self.std, self.kernels)
        return group.finished(pixels.view(group.pixels.shape))
