"""Training data in folders of pictures, as torchvision's ImageFolder and the users of DINO lay them out."""

from __future__ import annotations

from cosmos_ssl.api import Aside, Location, Spec
from cosmos_ssl.data.folder import EXTENSIONS, Folder
from cosmos_ssl.data.round_robin import RoundRobinShards


class ImageFolder(RoundRobinShards, Folder):
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
