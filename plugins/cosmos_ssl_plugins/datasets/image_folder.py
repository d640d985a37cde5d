"""Training data in folders of pictures, as torchvision's ImageFolder and the users of DINO lay them out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.api import Aside, Location, Sample, Spec
from cosmos_ssl.data.dealing import dealt_place, dealt_sizes
from cosmos_ssl.data.folder import EXTENSIONS, Folder

# The order shuffles whole shards and then, where there are more than loader.shuffle_samples, within windows of
# neighbours. Sorted pictures as one shard, or class folders as shards, would give each lane one class at a time:
# batches of as many classes as there are lanes, in the first case the same in every epoch. So the pictures are dealt
# out like cards into many small shards, each with pictures from all over the list. Nothing is lost by it: a picture is
# a file of its own and costs one random read in any order. (For disks and file systems that need long reads there are
# tar shards.)
DEALT = 64
"""Pictures in a shard."""


class ImageFolder(Folder):
    """Pictures below a folder: one folder a class, at any depth, or all in one.

    ``train_data`` is the folder. The folders directly below are the classes, whatever lies between them and their
    pictures, numbered by sorted name; they need not mean anything. ``validation_data`` is a folder or shards for
    evaluators that name no data. ``extensions`` are those of the pictures, in any case. Where texts are trained on,
    ``NAME.txt`` beside ``NAME.jpg`` holds its caption. ``cache_dir`` holds the index of the folder; without it the
    index lies beside the folder or in the user's cache folder. Pictures of more than ``max_pixels`` are bad samples.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        train_data: Location,
        validation_data: Location | None = None,
        extensions: tuple[str, ...] = EXTENSIONS,
        cache_dir: Aside[str | None] = None,
        max_pixels: int = 1 << 26,
    ) -> None:
        if max_pixels < 1:
            raise ValueError(f"max_pixels: {max_pixels} leaves no picture")
        super().__init__(
            train_data,
            extensions=extensions,
            captions=bool(spec.text_views),
            cache_dir=cache_dir,
            max_pixels=max_pixels,
        )
        self.validation_data = validation_data

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        """Pictures of each shard, int64 [shards]; at most ``DEALT``."""
        return dealt_sizes(len(self), DEALT)

    def place(self, index: int) -> int:
        """Return where sample ``index`` stands among the sorted pictures: card ``index % size`` of its shard, dealt
        round by round.
        """
        return dealt_place(index, len(self), DEALT)

    def read(self, index: int) -> Sample:
        """Sample ``index``; its key is its path from the folder. Raises OSError where storage fails, IndexError."""
        return super().read(self.place(index))

    def sources(self, index: int) -> Sequence[str]:
        """The files that sample ``index`` is read from."""
        return super().sources(self.place(index))

    def describe(self, index: int) -> str:
        """The folder that holds sample ``index``."""
        return super().describe(self.place(index))
