"""Which rows of packed images are read: what a view group's plan means where images lie end to end.

Shape letters: V views, B samples, N patches of one image.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from cosmos_ssl.api import GroupPlan
from cosmos_ssl.models.attention import Ints


class Read:
    """The packed rows of one group that are read: class tokens, all patches, those of its token views, masked
    ones.

    ``kept`` are the rows of all its images laid end to end that are encoded, ``places`` those of the tokens among all
    tokens of the token views; None is all of them, and in order.
    """

    def __init__(
        self, wanted: GroupPlan, batch: int, length: int, prefix: int, start: int, masks: Tensor | None
    ) -> None:
        self.wanted, self.batch, self.count = wanted, batch, length - prefix
        images = len(wanted.views) * batch
        self.lengths: Ints = np.full(images, length)
        self.kept: Ints | None = None
        self.places: Ints | None = None
        hidden = None if masks is None else masks.cpu().numpy()  # [V, B, N]
        if not wanted.drop_masked or hidden is None:
            self.pooled: Ints = start + length * np.arange(images)
            self.patches: Ints = self.pooled.reshape(-1, batch, 1) + np.arange(prefix, length)  # [V, B, N]
            self.tokens: Ints = self.patches[wanted.token_places].ravel()
            self.masked: Ints = self.patches[hidden] if wanted.masked_tokens else self.patches[:0].ravel()
            return
        kept = np.ones((len(wanted.views), batch, length), bool)
        kept[:, :, prefix:] = ~hidden
        self.kept = np.flatnonzero(kept)
        self.lengths = kept.sum(2).ravel()
        packed = start + np.cumsum(kept).reshape(kept.shape) - 1  # where each kept row lies
        self.pooled = packed[:, :, 0].ravel()
        seen = kept[wanted.token_places, :, prefix:]
        self.tokens = packed[wanted.token_places, :, prefix:][seen]
        self.masked = self.pooled[:0]
        self.places = np.flatnonzero(seen)
