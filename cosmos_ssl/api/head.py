"""DOC api.head"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from cosmos_ssl.api.loss import Features, Need
from cosmos_ssl.api.part import ParameterRule, Part
from cosmos_ssl.api.views import HeadOutput, Modality, Views


class Head(Part, nn.Module, ABC):
    """Features, or another head's output, to named outputs; runs on every role that a reader asks for.

    Readers name the outputs that they want (``Need.outputs``), and only those are computed.
    """

    mixes_samples: bool = False
    """True, of a class or an instance, where a sample's output depends on others of the batch (batch norm): bars exact
    accumulation.
    """

    @abstractmethod
    def outputs(self) -> Mapping[str, int]:
        """Width of each named output."""

    @abstractmethod
    def requires(self, outputs: Collection[str]) -> Sequence[Need]:
        """What ``forward`` reads for these outputs, of whichever role it runs on."""

    @abstractmethod
    def forward(self, features: Features, views: Views, outputs: Collection[str]) -> HeadOutput:
        """These outputs, [V, B, width] each, or [M, width] for masked patches."""

    def unread(self, outputs: Collection[str]) -> Sequence[str]:
        """fnmatch patterns of parameters that these outputs never reach (they are frozen)."""
        return ()

    def respond(self, *args: Any, **kwargs: Any) -> HeadOutput:
        """What a loss calls through ``StepContext.head`` for heads conditioned on other samples."""
        raise NotImplementedError(f"{type(self).__name__} cannot be called by a loss")

    def after_step(self) -> None:
        """Called once after every optimiser step, on student and teacher alike."""

    def parameter_rules(self) -> Sequence[ParameterRule]:
        """Rules of the parameters."""
        return ()

    # For methods in which a picture and a text match otherwise than by the dot product of their features:

    matches: ClassVar[bool] = False
    """True where ``match`` is the score of a picture and a text; retrieval then goes by it."""

    def match_needs(self, modality: Modality) -> Sequence[Need]:
        """What ``match_input`` reads of one modality: its group ``global``, with a single view."""
        return ()

    def match_input(self, features: Features, modality: Modality) -> Tensor:
        """What ``match`` wants to know of each picture or text, [B, ...]."""
        raise NotImplementedError

    def match(self, images: Tensor, texts: Tensor) -> Tensor:
        """Scores [B, T] of pictures [B, ...] and texts [T, ...]; memory beyond them is this method's care."""
        raise NotImplementedError
