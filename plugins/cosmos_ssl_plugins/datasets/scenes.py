"""The default data set: procedural scenes, written once into a cache folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cosmos_ssl.api import Location, Spec, UserError
from cosmos_ssl.data import Manifest, Shards
from cosmos_ssl.data.scenes import SceneOptions, default_folder, is_written, write_scenes


class Scenes(Shards):
    """Pictures of coloured, textured shapes with true sentences, labels and masks; no download.

    ``train_samples``, ``validation_samples``: how many; the held-out ones are for evaluators that name no data.
    ``image_size``: side of a picture, in pixels.
    ``colours``: how many colours objects have, 2 to 8; with each come eight shapes, a class each.
    ``seed``: other scenes.
    ``folder``: where the shards lie (by default in the user's cache folder, by options).
    ``caption_schema``: as for ``webdataset``.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        train_samples: int = 4096,
        validation_samples: int = 512,
        image_size: int = 64,
        colours: int = 8,
        seed: int = 0,
        folder: Location | None = None,
        caption_schema: str | None = "dreamlip",
    ) -> None:
        numbers = {"train_samples": train_samples, "validation_samples": validation_samples, "image_size": image_size}
        try:
            self._options = SceneOptions(**numbers, colours=colours, seed=seed)
        except UserError as error:  # located at the option
            raise UserError(str(error).removeprefix("scenes: ")) from error
        self._folder = Path(folder).expanduser() if folder else default_folder(self._options)
        self.validation_data = self._options.pattern(self._folder, "val")
        if spec.image_views and not spec.text_views:  # no text augmenter: captions are not used
            caption_schema = None
        super().__init__(self._options.pattern(self._folder, "train"), caption_schema=caption_schema)

    @property
    def manifest(self) -> Manifest:
        """Where every sample lies; written and indexed when first asked for."""
        if self._manifest is None:
            write_scenes(self._folder, self._options)
        return super().manifest

    def check_exists(self) -> bool:
        """Return whether they are written; if not, ``prepare`` writes them."""
        return is_written(self._folder, self._options)

    def prepare(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Write the scenes that are missing, then as for any shards."""
        write_scenes(self._folder, self._options)
        super().prepare(progress)
