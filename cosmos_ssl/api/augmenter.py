"""DOC api.augmenter"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from cosmos_ssl.api.part import Part, ViewSpec
from cosmos_ssl.api.views import ImageCrops, ImageGroup, Modality, Sample


class Augmenter(Part, ABC):
    """Makes the views of one modality: crops in a worker, photometric work on the device."""

    modality: ClassVar[Modality]

    @abstractmethod
    def offers(self) -> Mapping[str, ViewSpec]:
        """The view groups made, by name (``global``, ``local``, ...); groups without views are left out."""

    @abstractmethod
    def crop(self, sample: Sample, rng: np.random.Generator) -> Mapping[str, ImageCrops] | Mapping[str, Sequence[str]]:
        """Worker side: the views of one sample. All randomness comes from ``rng``; raise BadSample to replace it."""

    def finish(self, group: ImageGroup) -> ImageGroup:
        """Device side, batched: uint8 crops to normalised float views. Texts pass as they are."""
        return group
