"""Block-wise masks of patches, for masked image modelling.

Shape letters: V views, N patches of a view, on a square grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosmos_ssl_plugins.augmenters.geometry import check_span

TRIES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockMasks:
    """Draws the masks of a view group: with ``probability`` a view is masked, by a share of its patches uniform in
    ``ratio``.

    Blocks of patches are laid over one another until so many are masked (BEiT, arXiv 2106.08254, algorithm 1; the
    random masking of iBOT, arXiv 2111.07832, section 3.2). ``aspect`` is the range of a block's height / width. Without
    ``fill`` a mask may hide fewer patches than are drawn, as in the programs of iBOT and DINOv2 (``block_mask``).
    """

    grid: int
    """Patches along a side."""
    probability: float
    ratio: tuple[float, float]
    aspect: tuple[float, float]
    min_patches: int = 4
    """Least area of a block, as in DINOv2 (BEiT: 16)."""
    fill: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError for values that make no sense."""
        if not 0 < self.probability <= 1:
            raise ValueError(f"mask_probability: {self.probability:g} is not between 0 and 1")
        if self.grid < 1:
            raise ValueError(
                "mask_probability: the image tower has no patches to mask, or they are larger than the global views"
            )
        if not 0 < self.ratio[0] <= self.ratio[1] <= 1:
            raise ValueError(f"mask_ratio: {list(self.ratio)} is not a range of shares between 0 and 1")
        check_span("mask_aspect", self.aspect, "aspect ratios", most=1000)
        if self.min_patches < 1:
            raise ValueError(f"mask_min_patches: {self.min_patches} is less than 1")
        if not self.fill and self.min_patches > self.grid**2:
            raise ValueError(f"mask_min_patches: {self.min_patches} is more than the {self.grid**2} patches of a view")

    def __call__(self, views: int, rng: np.random.Generator) -> Tensor:
        """Masks bool [V, N], True where a patch is hidden; each view by itself."""
        patches = self.grid**2
        least = math.ceil(self.ratio[0] * patches)
        most = max(least, math.floor(self.ratio[1] * patches))
        masks = np.zeros((views, patches), bool)
        for mask in masks:
            if rng.random() < self.probability:
                count = int(rng.integers(least, most, endpoint=True))
                blocks = block_mask(self.grid, count, self.aspect, rng, min_patches=self.min_patches, fill=self.fill)
                mask[:] = blocks.ravel()
        return torch.from_numpy(masks)


def block_mask(
    grid: int,
    count: int,
    aspect: tuple[float, float],
    rng: np.random.Generator,
    *,
    min_patches: int = 4,
    fill: bool = True,
) -> NDArray[np.bool_]:
    """A mask, bool [grid, grid], of exactly ``count`` patches.

    A block has a uniform area of at least ``min_patches`` and at most what is left, a log-uniform aspect and a uniform
    place; one that would hide too many is drawn again, up to ten times, and then single patches fill what is left.

    Without ``fill`` fewer patches may be masked. Both sides of a block are smaller than the grid's. Its area is drawn
    between ``min_patches`` and what is left, also if less is left (iBOT, loader.py; DINOv2, data/masking.py).
    """
    longest = grid if fill else grid - 1
    mask = np.zeros((grid, grid), bool)
    left, tries = count, 0
    while left and tries < TRIES:
        low = min(min_patches, left) if fill else min_patches
        area = low + (left - low) * rng.random()
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        top, start = (int(rng.integers(max(1, grid - side + 1))) for side in (height, width))
        block = mask[top : top + height, start : start + width]
        new = height * width - int(block.sum())
        if height <= longest and width <= longest and 0 < new <= left:
            block[:] = True
            left, tries = left - new, 0
        else:
            tries += 1
    if left and fill:
        mask.flat[rng.choice(np.flatnonzero(~mask), left, replace=False)] = True
    return mask
