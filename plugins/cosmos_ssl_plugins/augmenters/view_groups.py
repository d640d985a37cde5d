"""Any number of view groups of one picture, each cut and changed in its own way."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

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
)
from cosmos_ssl_plugins.augmenters.geometry import check_crops, check_ranges, check_span, crop_boxes, resized_crops
from cosmos_ssl_plugins.augmenters.masks import BlockMasks
from cosmos_ssl_plugins.augmenters.photometric import MAX_BLUR, Draw, Strengths, finish, standardise


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewGroup:
    """One group of square views; by default one random resized crop and nothing else.

    ``scale`` is a range of shares of the picture's area; the options of the changes and of the masks mean what
    ``multi_crop``'s do.
    """

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid"}

    number: Few = 1
    size: Pixels = 224
    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_prob: float = 0.0
    color_jitter_prob: float = 0.0
    brightness: Strength = 0.4
    contrast: Strength = 0.4
    saturation: Strength = 0.2
    hue: float = 0.1
    grayscale_prob: float = 0.0
    gaussian_blur_prob: float = 0.0
    gaussian_blur_radius: tuple[float, float] = (0.1, 2.0)
    solarize_prob: float = 0.0
    solarize_threshold: int = 128
    mask_probability: float = 0.0
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    mask_aspect: tuple[float, float] = (0.3, 1 / 0.3)
    mask_min_patches: Size = 4
    mask_fill: bool = True

    def check(self) -> None:
        """Raise ValueError for values that make no sense."""
        if self.number < 1:
            raise ValueError(f"number: {self.number} leaves no view; give at least 1")
        check_crops("", self.size, self.scale, self.ratio)
        check_ranges(flip_prob=self.flip_prob, color_jitter_prob=self.color_jitter_prob)
        check_ranges(grayscale_prob=self.grayscale_prob, gaussian_blur_prob=self.gaussian_blur_prob)
        check_ranges(solarize_prob=self.solarize_prob)
        check_ranges(most=math.inf, brightness=self.brightness, contrast=self.contrast, saturation=self.saturation)
        check_ranges(most=0.5, hue=self.hue)
        check_ranges(most=255, solarize_threshold=self.solarize_threshold)
        check_span("gaussian_blur_radius", self.gaussian_blur_radius, "radii", most=MAX_BLUR)

    def masks(self, patch: int) -> BlockMasks | None:
        """What draws the masks of its views, of patches of ``patch`` pixels; None where there are none.

        Raises ValueError for values that make no sense.
        """
        if not self.mask_probability:
            return None
        grid = self.size // patch if patch else 0
        return BlockMasks(
            grid=grid,
            probability=self.mask_probability,
            ratio=self.mask_ratio,
            aspect=self.mask_aspect,
            min_patches=self.mask_min_patches,
            fill=self.mask_fill,
        )

    @property
    def draw(self) -> Draw | None:
        """What draws the parameters of its views; None where they stay as they are cut."""
        strengths = Strengths(
            flip=self.flip_prob,
            jitter=self.color_jitter_prob,
            factors=(self.brightness, self.contrast, self.saturation, self.hue),
            grey=self.grayscale_prob,
            blur=self.gaussian_blur_prob,
            blur_radius=self.gaussian_blur_radius,
            solarize=self.solarize_prob,
            solarize_threshold=self.solarize_threshold,
        )
        changed = any((strengths.flip, strengths.jitter, strengths.grey, strengths.blur, strengths.solarize))
        return Draw([strengths] * self.number) if changed else None


class ViewGroups(Augmenter):
    """View groups by name, such as one weakly changed view for CLIP and two strongly changed ones for SimCLR (SLIP,
    arXiv 2112.12750).

    A group's views of a sample depend on its own name and options alone: another group, or another order, changes
    nothing.
    """

    modality: ClassVar[Modality] = "image"

    def __init__(self, spec: Spec, *, groups: dict[str, ViewGroup | None]) -> None:
        """Raises ValueError for values that make no sense.

        groups: options of each group by its name; a null takes a group out (of a config that is extended).
        """
        self._groups = {name: group for name, group in groups.items() if group is not None}
        if not self._groups:
            raise ValueError("groups: no group is left; give at least one")
        tower = spec.image or TowerSpec(width=0)
        self.kernels = spec.kernels
        self._masks: dict[str, BlockMasks | None] = {}
        for name, group in self._groups.items():
            try:
                group.check()
                self._masks[name] = group.masks(tower.patch_size)
            except ValueError as error:
                raise ValueError(f"groups.{name}.{error}") from None
        self.mean, self.std = tower.mean, tower.std
        self._draws = {name: group.draw for name, group in self._groups.items()}

    def offers(self) -> Mapping[str, ViewSpec]:
        """The groups, in the order of the config."""
        return {
            name: ViewSpec(views=group.number, size=group.size, masks=self._masks[name] is not None)
            for name, group in self._groups.items()
        }

    def crop(self, sample: Sample, rng: np.random.Generator) -> Mapping[str, ImageCrops]:
        """Crops as uint8 [V, 3, size, size] by group, with parameter rows where they change, and masks.

        Raises BadSample as ``decode`` does.
        """
        image = sample.decode()
        height, width = image.shape[-2:]
        base = int(rng.integers(1 << 63))
        crops = {}
        for name, group in self._groups.items():
            own = np.random.default_rng((base, zlib.crc32(name.encode())))
            boxes = crop_boxes(group.number, height, width, group.scale, group.ratio, own)
            draw = self._draws[name]
            params = torch.empty(group.number, 0) if draw is None else draw(own)
            draw_masks = self._masks[name]
            masks = None if draw_masks is None else draw_masks(group.number, own)  # last: the views stay as without
            crops[name] = ImageCrops(pixels=resized_crops(image, boxes, group.size), params=params, masks=masks)
        return crops

    def finish(self, group: CropGroup) -> ImageGroup:
        """uint8 [V, B, 3, H, W] to normalised float32 of the same shape."""
        if not group.params.shape[-1]:
            return group.finished(standardise(group.pixels, self.mean, self.std, self.kernels))
        pixels = finish(group.pixels.flatten(0, 1), group.params.flatten(0, 1), self.mean, self.std, self.kernels)
        return group.finished(pixels.view(group.pixels.shape))
