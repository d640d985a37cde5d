"""Samples of a flat list dealt out like cards into small shards, each with samples from all over the list.

The order shuffles whole shards and then, where there are more than loader.shuffle_samples, within windows of
neighbours: a sorted list as one shard, or its classes as shards, would give each lane one class at a time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def dealt_sizes(count: int, most: int) -> NDArray[np.int64]:
    """Samples of each shard, int64 [shards], at most ``most``."""
    shards = -(-count // most)
    rounds, larger = divmod(count, max(shards, 1))
    return np.where(np.arange(shards) < larger, rounds + 1, rounds).astype(np.int64)


def dealt_place(index: int, count: int, most: int) -> int:
    """Where sample ``index`` stands in the list: card ``index % size`` of its shard, dealt round by round.

    Raises IndexError.
    """
    if not 0 <= index < count:
        raise IndexError(f"picture {index} of {count}")
    shards = -(-count // most)
    rounds, larger = divmod(count, shards)  # the first ones have one more
    shard, card = divmod(index, rounds + 1)
    if shard >= larger:
        shard, card = divmod(index - larger, rounds)
    return card * shards + shard
