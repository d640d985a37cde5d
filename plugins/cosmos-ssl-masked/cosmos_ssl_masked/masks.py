"""One crop of a picture, and which of its patches the student sees: MAE's random masks, I-JEPA's blocks.

Shape letters: V views, B samples, N patches of a view on a square grid, K target blocks.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cosmos_ssl.api import (
    Augmenter,
    CropGroup,
    Few,
    ImageCrops,
    ImageGroup,
    Modality,
    Pixels,
    Sample,
    Share,
    Size,
    Spec,
    TowerSpec,
    ViewSpec,
)

Box: TypeAlias = tuple[int, int, int, int]
"""Top, left, height, width."""
Span: TypeAlias = tuple[float, float]
TRIES = 10
ASPECT = (3 / 4, 4 / 3)
"""Width over height of a crop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockViews(ViewSpec):
    """Views that come with target blocks."""

    blocks: int
    """K, of each view."""


class MaskedCrop(Augmenter):
    """Group ``global``: one random resized crop, mirrored by chance, and its mask.

    Parameters of the view are whether it is mirrored, and a ``Box`` in patches for each target block.
    """

    modality: ClassVar[Modality] = "image"

    def __init__(self, spec: Spec, size: int, scale: Span, flip_prob: float) -> None:
        """Raises ValueError for values that make no sense."""
        check_span("scale", scale)
        tower = spec.image or TowerSpec(width=0)
        self.grid = size // tower.patch_size if tower.patch_size else 0
        if not self.grid:
            raise ValueError(f"size: views of {size} pixels hold no patch of the image tower's")
        self.mean, self.std = tower.mean, tower.std
        self.size, self.scale, self.flip_prob = size, scale, flip_prob

    def offers(self) -> Mapping[str, ViewSpec]:
        """``global``, one view, with a mask."""
        return {"global": ViewSpec(views=1, size=self.size, masks=True)}

    @abstractmethod
    def hide(self, rng: np.random.Generator) -> tuple[NDArray[np.bool_], Sequence[Box]]:
        """Which patches are hidden, bool [N], and the target blocks."""

    def crop(self, sample: Sample, rng: np.random.Generator) -> Mapping[str, ImageCrops]:
        """The crop, uint8 [1, 3, size, size], its parameters [1, 1 + 4 K] and mask [1, N].

        Raises BadSample as ``decode`` does.
        """
        picture = sample.decode()
        top, left, height, width = crop_box(picture.shape[1], picture.shape[2], self.scale, rng)
        cut = picture[None, :, top : top + height, left : left + width]
        pixels = F.interpolate(cut, (self.size, self.size), mode="bicubic", antialias=True)
        flip = rng.random() < self.flip_prob
        hidden, blocks = self.hide(rng)
        params = torch.tensor([[flip, *(number for box in blocks for number in box)]], dtype=torch.float32)
        return {"global": ImageCrops(pixels=pixels, params=params, masks=torch.from_numpy(hidden)[None])}

    def finish(self, group: CropGroup) -> ImageGroup:
        """uint8 [1, B, 3, H, W] to normalised float32 of the same shape."""
        device = group.pixels.device
        mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (self.mean, self.std))
        pixels = (group.pixels / 255 - mean) / std
        flip = group.params[..., :1, None, None].to(device, non_blocking=True) > 0  # [1, B, 1, 1, 1]
        return group.finished(torch.where(flip, pixels.flip(-1), pixels))


class RandomMasks(MaskedCrop):
    """MAE's views: patches are hidden evenly at random, as many of each picture (arXiv 2111.06377, section 3).

    ``mask_ratio``: share of the patches that is hidden.
    ``size``: side of the view, in pixels.
    ``scale``: range of the crop's area, as a share of the picture.
    ``flip_prob``: how likely the view is mirrored.

    Raises ValueError for values that make no sense.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        mask_ratio: Share = 0.75,
        size: Pixels = 224,
        scale: tuple[float, float] = (0.2, 1.0),
        flip_prob: Share = 0.5,
    ) -> None:
        super().__init__(spec, size, scale, flip_prob)
        patches = self.grid**2
        self.seen = int(patches * (1 - mask_ratio))
        if not 0 < self.seen < patches:
            raise ValueError(f"mask_ratio: {mask_ratio:g} hides none or all of {patches} patches")

    def hide(self, rng: np.random.Generator) -> tuple[NDArray[np.bool_], Sequence[Box]]:
        """All but the first patches of a random order."""
        hidden = np.ones(self.grid**2, bool)
        hidden[rng.permutation(len(hidden))[: self.seen]] = False
        return hidden, ()


class MultiBlock(MaskedCrop):
    """I-JEPA's views: blocks to predict, and a large block without them, the context, to predict them from (arXiv
    2301.08243, section 3).

    Hidden is what is not in the context. Sizes are drawn for each picture and block, evenly, and rounded to whole
    patches; target blocks may overlap. Blocks that leave too little of the context are all drawn anew, up to ten times.

    ``blocks``: target blocks of a view.
    ``target_scale``, ``target_aspect``: ranges of a target block's area, as a share of the view, and of its height over
    its width.
    ``context_scale``: range of the context's area, a square, before the targets are taken from it.
    ``min_context``: patches that the targets leave of the context at least.
    ``joint_aspect``: one random number sets area and aspect of a block, so that larger target blocks are taller.
    ``inside``: both sides of a block are shorter than the view's.
    ``size``, ``scale``, ``flip_prob``: as of ``random_masks``.

    Raises ValueError for values that make no sense.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        blocks: Few = 4,
        target_scale: tuple[float, float] = (0.15, 0.2),
        target_aspect: tuple[float, float] = (0.75, 1.5),
        context_scale: tuple[float, float] = (0.85, 1.0),
        min_context: Size = 1,
        joint_aspect: bool = False,
        inside: bool = False,
        size: Pixels = 224,
        scale: tuple[float, float] = (0.3, 1.0),
        flip_prob: Share = 0.0,
    ) -> None:
        super().__init__(spec, size, scale, flip_prob)
        check_span("target_scale", target_scale)
        check_span("target_aspect", target_aspect, most=1000)
        check_span("context_scale", context_scale)
        if not 1 <= min_context <= self.grid**2:
            raise ValueError(f"min_context: {min_context} is not between 1 and the {self.grid**2} patches of a view")
        if inside and self.grid == 1:
            raise ValueError("inside: no block is smaller than a view of one patch")
        self.blocks, self.target, self.aspect, self.context = blocks, target_scale, target_aspect, context_scale
        self.min_context, self.joint_aspect, self.longest = min_context, joint_aspect, self.grid - inside

    def offers(self) -> Mapping[str, ViewSpec]:
        """``global``, one view, with a mask and target blocks."""
        return {"global": BlockViews(views=1, size=self.size, masks=True, blocks=self.blocks)}

    def hide(self, rng: np.random.Generator) -> tuple[NDArray[np.bool_], Sequence[Box]]:
        """All but the context, which shares no patch with the target blocks."""
        for _ in range(TRIES):
            targets = [self._block(self.target, self.aspect, rng) for _ in range(self.blocks)]
            hidden = np.ones((self.grid, self.grid), bool)
            for number, (top, left, height, width) in enumerate([self._block(self.context, (1, 1), rng), *targets]):
                hidden[top : top + height, left : left + width] = number > 0
            if np.count_nonzero(~hidden) >= self.min_context:
                break
        return hidden.ravel(), targets

    def _block(self, scale: Span, aspect: Span, rng: np.random.Generator) -> Box:
        if self.joint_aspect:  # as in facebookresearch/ijepa, src/masks/multiblock.py, _sample_block_size
            u = rng.random()
            share, ratio = (low + u * (high - low) for low, high in (scale, aspect))
        else:
            share, ratio = rng.uniform(*scale), rng.uniform(*aspect)
        area = self.grid**2 * share
        sides = (math.sqrt(area * ratio), math.sqrt(area / ratio))
        height, width = (min(self.longest, max(1, round(side))) for side in sides)
        return int(rng.integers(self.grid - height + 1)), int(rng.integers(self.grid - width + 1)), height, width


def target_masks(group: ImageGroup, blocks: int) -> Tensor:
    """The patches to predict of a group of views, bool [K, V, B, N], on the host: each block that ``MultiBlock`` drew,
    or with ``blocks`` 0 all that is hidden (K = 1). It is all that is hidden, K times, of made-up views, which come
    without parameters (those that costs are counted on).
    """
    assert group.masks is not None, "views without masks have nothing to predict"
    if not blocks or not group.params.shape[-1]:
        return group.masks.expand(max(1, blocks), *group.masks.shape)
    boxes = group.params[..., 1:].unflatten(-1, (blocks, 4)).movedim(2, 0)[..., None]  # [K, V, B, 4, 1]
    start, length = boxes.split(2, dim=3)
    places = torch.arange(math.isqrt(group.masks.shape[-1]))
    rows, columns = torch.unbind((places >= start) & (places < start + length), 3)  # [K, V, B, side]
    return torch.flatten(rows[..., :, None] & columns[..., None, :], -2)


def crop_box(height: int, width: int, scale: Span, rng: np.random.Generator) -> Box:
    """Draw a box by the rule of RandomResizedCrop: area even in ``scale``, aspect log-even within 3:4 and 4:3; what
    fits in none of ten tries is the largest centred box.
    """
    for _ in range(TRIES):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h, w = min(height, round(width / ASPECT[0])), min(width, round(height * ASPECT[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def check_span(option: str, span: Span, most: float = 1) -> None:
    """Raise ValueError for a range that runs backwards or leaves 0..``most``, 0 excluded."""
    if not 0 < span[0] <= span[1] <= most:
        raise ValueError(f"{option}: {list(span)} is not a range between 0 and {most:g}")
