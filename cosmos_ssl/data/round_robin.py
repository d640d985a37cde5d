"""A flat list of samples served as small shards, each with samples from all over the list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.api import IndexedDataset, Sample


class RoundRobinShards(IndexedDataset):
    """Assign the samples of a flat dataset to small shards in turn; a base to name before that dataset.

    The order shuffles whole shards and then, if there are more than loader.shuffle_samples, within windows of
    neighbors. Sorted samples as one shard, or their classes as shards, would give each lane one class at a time: in
    the first case batches of the same classes in every epoch. A picture in a file of its own costs one random read in
    any order, so that nothing is lost. (For disks and file systems that need long reads there are tar shards.)
    """

    max_shard_size: ClassVar[int] = 64

    if TYPE_CHECKING:  # of the other base; an abstract method here would hide it

        def __len__(self) -> int: ...

    def _shards(self) -> tuple[int, int, int]:
        """Number of shards, samples of the smaller ones, and how many have one more, which come first."""
        shards = -(-len(self) // self.max_shard_size)
        return shards, *divmod(len(self), max(shards, 1))

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        """Samples of each shard, int64 [shards]; at most ``max_shard_size``."""
        shards, size, larger = self._shards()
        return np.where(np.arange(shards) < larger, size + 1, size).astype(np.int64)

    def place(self, index: int) -> int:
        """Return where sample ``index`` stands in the list: shard s of S has s, s + S, s + 2 S and so on.

        Raises IndexError.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shards, size, larger = self._shards()
        shard, turn = divmod(index, size + 1)
        if shard >= larger:
            shard, turn = divmod(index - larger, size)
        return turn * shards + shard

    def read(self, index: int) -> Sample:
        """Sample ``index``. Raises as the dataset itself does."""
        return super().read(self.place(index))  # type: ignore[safe-super]

    def sources(self, index: int) -> Sequence[str]:
        """The files that sample ``index`` is read from."""
        return cast(Sequence[str], cast(Any, super()).sources(self.place(index)))

    def describe(self, index: int) -> str:
        """The folder or table that holds sample ``index``."""
        return super().describe(self.place(index))
