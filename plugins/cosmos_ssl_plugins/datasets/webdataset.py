"""Training data in webdataset shards."""

from __future__ import annotations

from cosmos_ssl.api import Aside, Location, Spec
from cosmos_ssl.data import Shards


class WebDataset(Shards):
    """Image-text shards: ``KEY.jpg`` (jpeg, png, webp) beside ``KEY.json`` or ``KEY.txt``, and ``KEY.cls`` if there are
    labels.

    ``train_data`` names the shards (braces, ``*``, ``::`` between lists, ``.list`` files, a folder of ``.tar`` files;
    paths or fsspec URLs).
    ``caption_schema``: ``dreamlip``, ``pixelprose``, ``txt``, ``json:KEY``, ``all``, or null for pictures alone.
    ``validation_data`` is for evaluators that name no shards. ``cache_dir`` holds the manifest and, for remote shards,
    blocks of up to ``cache_gib`` GiB; without it the manifest lies beside the shards or in the user's cache folder.
    Pictures of more than ``max_pixels`` are bad samples.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        train_data: Location | list[Location],
        caption_schema: str | None = "dreamlip",
        validation_data: Location | None = None,
        cache_dir: Aside[str | None] = None,
        cache_gib: Aside[float] = 32.0,
        max_pixels: int = 1 << 26,
    ) -> None:
        if spec.image_views and not spec.text_views:  # no text augmenter: captions are not used
            caption_schema = None
        if not 0 <= cache_gib <= 1 << 20:
            raise ValueError(f"cache_gib: {cache_gib:g} is no size of a cache in GiB")
        if max_pixels < 1:
            raise ValueError(f"max_pixels: {max_pixels} leaves no picture")
        super().__init__(
            train_data, caption_schema=caption_schema, cache_dir=cache_dir, cache_gib=cache_gib, max_pixels=max_pixels
        )
        self.validation_data = validation_data
