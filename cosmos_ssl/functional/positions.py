"""Fixed positions of patches."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sincos_positions(patches: int, width: int, device: torch.device | None = None) -> Tensor:
    """Return fixed positions of the patches of a square grid, float32 [N, width].

    Sines and cosines of a patch's row, then of its column (arXiv 1706.03762, section 3.5, for two axes as in MoCo v3).

    Args:
        patches: N, a square number.
        width: a multiple of 4.
        device: of the result.
    """
    side = math.isqrt(patches)
    rates = 10000 ** -(torch.arange(width // 4, device=device) / (width // 4))
    angles = torch.arange(side, device=device)[:, None] * rates  # [side, width / 4]
    line = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = line[:, None].expand(-1, side, -1), line.expand(side, -1, -1)
    return torch.cat([rows, columns], 2).flatten(0, 1)
