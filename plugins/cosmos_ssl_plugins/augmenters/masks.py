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

SMALLEST = 4
"""Patches of the smallest block, as in DINOv2 (BEiT: 16)."""
TRIES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockMasks:
    """Draws the masks of a view group: with ``probability`` a view is masked, by a share of its patches uniform in
    ``ratio``.

    Blocks of patches are laid over one another until so many are masked (BEiT, arXiv 2106.08254, algorithm 1; the
    random masking of iBOT, arXiv 2111.07832, section 3.2). ``aspect`` is the range of a block's height / width.
    """

    grid: int
    """Patches along a side."""
    probability: float
    ratio: tuple[float, float]
    aspect: tuple[float, float]

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

    def __call__(self, views: int, rng: np.random.Generator) -> Tensor:
        """Masks bool [V, N], True where a patch is hidden; each view by itself."""
        patches = self.grid**2
        least = math.ceil(self.ratio[0] * patches)
        most = max(least, math.floor(self.ratio[1] * patches))
        masks = np.zeros((views, patches), bool)
        for mask in masks:
            if rng.random() < self.probability:
                count = int(rng.integers(least, most, endpoint=True))
                mask[:] = block_mask(self.grid, count, self.aspect, rng).ravel()
        return torch.from_numpy(masks)


def block_mask(grid: int, count: int, aspect: tuple[float, float], rng: np.random.Generator) -> NDArray[np.bool_]:
    """A mask, bool [grid, grid], of exactly ``count`` patches.

    A block has a uniform area of at least 4 patches and at most what is left, a log-uniform aspect and a uniform place;
    one that would hide too many is drawn again, up to ten times, and then single patches fill what is left.
    """
    mask = np.zeros((grid, grid), bool)
    left, tries = count, 0
    while left and tries < TRIES:
        area = rng.uniform(min(SMALLEST, left), left)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        top, start = (int(rng.integers(max(1, grid - side + 1))) for side in (height, width))
        block = mask[top : top + height, start : start + width]
        new = height * width - int(block.sum())
        if height <= grid and width <= grid and 0 < new <= left:
            block[:] = True
            left, tries = left - new, 0
        else:
            tries += 1
    if left:
        mask.flat[rng.choice(np.flatnonzero(~mask), left, replace=False)] = True
    return mask
