"""For authors of evaluators: one role's model and data to named numbers and pictures.

An evaluator in full::

    import torch
    from cosmos_ssl.api import Encoder, Evaluation, Evaluator, Spec
    from PIL import Image


    class ColourNames(Evaluator):
        '''The share of plain colours that the model calls by their name.'''

        def __init__(self, spec: Spec) -> None:
            self.names = ("red", "green", "blue", "white")

        def evaluate(self, encoder: Encoder, *, pictures: bool = False) -> Evaluation:
            shown = [encoder.preprocess(Image.new("RGB", (64, 64), name)) for name in self.names]
            images = encoder.encode_image(torch.stack(shown))  # unit vectors [B, D]
            texts = encoder.encode_text(encoder.tokenize([f"a {name} square" for name in self.names]))  # [T, D]
            right = (images @ texts.T).argmax(1).cpu() == torch.arange(len(self.names))
            return Evaluation(metrics={"top1": right.float().mean().item()})

A config then says ``evaluators: {colours: {type: colour_names, every_epochs: 1}}``; ``every_epochs`` is the engine's
(without it: at the end). Options and ``spec``: ``cosmos_ssl.api.part``. Data that it is not given may be
``spec.validation_data``.

When: ``prepare`` before training and in a dry run; ``evaluate`` when it is due, for the student and then the teacher,
on all ranks. Metrics become ``NAME/ROLE/METRIC``.

What a head or a tower gives beyond vectors, an evaluator reads as a loss does:
``encoder.features([Need(head="caption")], pixels=images, tokens=ids).heads["caption"]``, [1, B, ...]; or it lets a head
answer, ``encoder.respond("caption", ...)``. ``encoder.decode`` tells what token ids say.

Shapes: B pictures, T texts, S tokens of a padded text, H x W pixels; W width of the image tower, D shared width.

What must hold: with several ranks each returns the same numbers (all may do the same; what is shared out is put
together by ``cosmos_ssl.functional``). Nothing of the model changes: the encoder works without gradients, in evaluation
mode. Work is done in batches, through the encoder: it tells the run that it is alive.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from cosmos_ssl.api.loss import Features, Need
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
        """Return how well pictures [B, ...] and texts [T, ...] match, [B, T]: a head's ``match``, by default the dot
        product.
        """
        ...

    def features(
        self, needs: Sequence[Need], *, pixels: Tensor | None = None, tokens: Tensor | None = None
    ) -> Features:
        """Return what a loss would be given for these needs, of normalised pictures [B, 3, H, W] and token ids [B, S].

        They are the one view of the group ``global``, and whole: tokens and outputs of heads are [1, B, ...].
        """
        ...

    def respond(self, head: str, *args: Any, **kwargs: Any) -> Mapping[str, Tensor]:
        """Call a head's ``respond``, as a loss does by ``StepContext.head``: a decoder's next token, say."""
        ...

    def preprocess(self, image: Any) -> Tensor:
        """A PIL image, or uint8 [3, H, W]: shorter side resized bicubic, centre crop, normalised [3, H, W]."""
        ...

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Strings -> token ids [n, S]."""
        ...

    def lengths(self, tokens: Tensor) -> Tensor:
        """Tokens of each text [..., S] up to and with its end."""
        ...

    def decode(self, ids: Sequence[int]) -> list[str]:
        """The readable piece of text behind each id."""
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
