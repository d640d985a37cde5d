"""For authors of heads: features, or another head's output, to named outputs that losses and other heads read.

A head in full::

    from collections.abc import Collection, Mapping

    from cosmos_ssl.api import Features, Head, HeadOutput, Need, Size, Spec, Views
    from torch import nn


    class Bottleneck(Head):
        '''A linear map of each modality's projected features to fewer dimensions; outputs ``image`` and ``text``.

        ``width``: of both outputs.
        '''

        def __init__(self, spec: Spec, *, width: Size = 64) -> None:
            super().__init__()
            self.width = width
            self.image, self.text = nn.Linear(spec.embed_dim, width), nn.Linear(spec.embed_dim, width)

        def outputs(self) -> Mapping[str, int]:
            return {"image": self.width, "text": self.width}

        def requires(self, outputs: Collection[str]) -> list[Need]:
            return [Need(modality=name, group="global") for name in ("image", "text") if name in outputs]

        def forward(self, features: Features, views: Views, outputs: Collection[str]) -> HeadOutput:
            maps = {"image": self.image, "text": self.text}
            return {name: maps[name](features.stack(name, group="global")) for name in outputs}  # [V, B, width]

        def unread(self, outputs: Collection[str]) -> list[str]:
            return [f"{name}.*" for name in ("image", "text") if name not in outputs]

A config then says ``heads: {small: {type: bottleneck, width: 32}}``, and a loss reads it by ``Need(head="small")`` as
``ctx.student.heads["small"]["image"]``. A head may read heads that are listed above it: ``spec.heads`` has the widths
of their outputs, ``features.heads`` what they computed. Options, and the rest of ``spec``: ``cosmos_ssl.api.part``;
``Need`` and ``Features``, with their shapes: ``cosmos_ssl.api.loss``.

Tokens, masked patches that the student does not see, and raw views (a decoder's token ids): ``Need`` of
``cosmos_ssl.api.loss``. A head that is read of the teacher alone is not trained.

When: the outputs that some reader asks for are known once the model is built; ``requires`` and ``unread`` are asked
with them. In each step ``forward`` runs after the towers, on each role that is read (the teacher's copy without
gradients); ``set_progress`` tells the step before. ``respond`` is called by a loss that conditions it on other samples.
``after_step`` follows the optimiser.

What must hold: an output has its width in its last dimension, of views [V, B, width], of their tokens [V, B, N, width],
of masked patches [M, width], and is the same whichever others are asked for. A sample's output depends on no
other sample of the batch, unless ``mixes_samples``. ``unread`` names exactly the parameters that these outputs do not
reach. State and random numbers as in losses. ``cosmos_ssl.testing.check_head`` tries all this.

A head that can say where it looks is an ``AttendingHead``, one that scores pictures and texts a ``MatchingHead``: it
has their methods, and need not derive from them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

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
        """Return what ``forward`` reads for these outputs, of whichever role it runs on."""

    @abstractmethod
    def forward(self, features: Features, views: Views, outputs: Collection[str]) -> HeadOutput:
        """These outputs, [V, B, width] each, [V, B, N, width] of tokens, or [M, width] of masked patches."""

    def unread(self, outputs: Collection[str]) -> Sequence[str]:
        """fnmatch patterns of parameters that these outputs never reach (they are frozen)."""
        return ()

    def respond(self, *args: Any, **kwargs: Any) -> HeadOutput:
        """Answer a loss that calls this head by ``StepContext.head`` (heads conditioned on other samples)."""
        raise NotImplementedError(f"{type(self).__name__} cannot be called by a loss")

    def after_step(self) -> None:
        """Called once after every optimiser step, on student and teacher alike."""

    def parameter_rules(self) -> Sequence[ParameterRule]:
        """Learning rates, decay and freezing of its parameters, where they are not the run's own."""
        return ()


@runtime_checkable
class AttendingHead(Protocol):
    """A head that can say where a picture looks in its text, and the text in the picture; ``attend`` draws it."""

    def attention_weights(self, features: Features, views: Views) -> Mapping[str, Tensor]:
        """Weights that sum to one: ``image`` over words [V, B, S], ``text`` over patches [V, B, N].

        Group ``global`` of both modalities is there, with one view, projected and as tokens.
        """
        ...


@runtime_checkable
class MatchingHead(Protocol):
    """A head by which pictures and texts match, in the place of the dot product of their features; retrieval goes by
    it.
    """

    matches: bool
    """True where it does."""

    def match_needs(self, modality: Modality) -> Sequence[Need]:
        """Return what ``match_input`` reads of one modality: its group ``global``, with a single view."""
        ...

    def match_input(self, features: Features, modality: Modality) -> Tensor:
        """Return what ``match`` wants to know of each picture or text, [B, ...]."""
        ...

    def match(self, images: Tensor, texts: Tensor) -> Tensor:
        """Scores [B, T] of pictures [B, ...] and texts [T, ...]; memory beyond them is this method's care."""
        ...
