"""DOC api.evaluator"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from cosmos_ssl.api.part import Part, Spec
from cosmos_ssl.api.views import Modality


class Encoder(Protocol):
    """One role's model as evaluators and users see it; features are unit vectors."""

    spec: Spec

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        ...

    def encode_image(self, pixels: Tensor, *, normalize: bool = True) -> Tensor:
        """Normalised pictures [B, 3, H, W] -> [B, D]."""
        ...

    def encode_text(self, tokens: Tensor, *, normalize: bool = True) -> Tensor:
        """Token ids [B, S] -> [B, D]."""
        ...

    def image_features(self, pixels: Tensor) -> Tensor:
        """Normalised pictures -> pooled features before the projection, [B, W]."""
        ...

    def match_image(self, pixels: Tensor) -> Tensor:
        """Normalised pictures -> what ``match`` wants to know of each, [B, ...]; unit vectors where no head says
        otherwise.
        """
        ...

    def match_text(self, tokens: Tensor) -> Tensor:
        """Token ids -> what ``match`` wants to know of each text, [T, ...]; unit vectors where no head says
        otherwise.
        """
        ...

    def match(self, images: Tensor, texts: Tensor) -> Tensor:
        """How well pictures [B, ...] and texts [T, ...] match, [B, T]: a head's ``match``, by default the dot
        product.
        """
        ...

    def preprocess(self, image: Any) -> Tensor:
        """A PIL image, or uint8 [3, H, W]: shorter side resized bicubic, centre crop, normalised [3, H, W]."""
        ...

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Strings -> token ids [n, S]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What an evaluator found: named numbers, and pictures as uint8 [3, H, W]."""

    metrics: Mapping[str, float]
    pictures: Mapping[str, Tensor] = field(default_factory=dict)


class Evaluator(Part, ABC):
    """A model and data to named numbers and pictures. Reserved option: ``every_epochs``."""

    modalities: ClassVar[tuple[Modality, ...]] = ("image", "text")
    """The towers it needs."""

    def prepare(self) -> None:
        """Look at the data, once before training: a missing file is better found now. Raises DataError."""

    @abstractmethod
    def evaluate(self, encoder: Encoder, *, pictures: bool = False) -> Evaluation:
        """Evaluate one role's model; metric names as OpenCLIP's (``image_to_text_R@1``)."""
