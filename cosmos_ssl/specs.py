"""What parts say of themselves and of a step: needs, plans, the spec of a model, a loss's context and output.

Shape letters as in ``cosmos_ssl.types``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from cosmos_ssl.pictures import BACKGROUND
from cosmos_ssl.types import ALL, Features, HeadOutput, Kind, Modality, Role, Views


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """One thing that a head or a loss reads. The union of all needs is the plan of a step.

    Either features (``modality``, ``group``, ``views``, ``kind``) or a head's output (``head``).
    A head runs on whichever role its readers ask for; ``role`` in a head's own needs is ignored.
    """

    role: Role = "student"
    modality: Modality | None = None
    group: str = ALL
    views: tuple[int, ...] | None = None
    """Which of the group's views; None is all of them."""
    kind: Kind = "projected"
    pads: bool = False
    """Tokens of texts: also those after the end of the text (otherwise zeros stand there)."""
    head: str | None = None
    outputs: tuple[str, ...] | None = None
    """Which of the head's outputs; None is all of them."""
    gathered: bool = False
    """Also wanted from all ranks, as ``StepContext.gathered[role]`` with the global batch in B's place; not for masked patches."""

    def __post_init__(self) -> None:
        if (self.head is None) == (self.modality is None):
            raise ValueError("a Need names either a modality or a head")
        if self.outputs is not None and self.head is None:
            raise ValueError("a Need names outputs of a head only")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """What a tower must compute for one view group."""

    views: tuple[int, ...]
    tokens: tuple[int, ...] = ()
    """Views (a part of ``views``) whose tokens are read."""
    pads: bool = False
    projected: bool = True
    hide_masked: bool = False
    """Masked patches are replaced by the mask token (the student of masked image modelling)."""
    masked_tokens: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewSpec:
    """One view group that an augmenter offers."""

    views: int
    size: int | None = None
    """Side of the square image views, in pixels."""
    masks: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerSpec:
    """What the rest of the model may know of a tower."""

    width: int
    image_size: int = 0
    patch_size: int = 0
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a part may know of the model around it: the first argument of every part's constructor.

    Parts are built in the order tokenizer, towers, augmenters, data set, heads (as listed), losses,
    teacher, evaluators; each sees what was built before it.
    """

    embed_dim: int
    batch_size: int = 1
    """Samples of the global batch."""
    steps_per_epoch: int = 1
    epochs: int = 1
    seed: int = 0
    attention: str = "auto"
    has_teacher: bool = False
    context_length: int = 0
    vocab_size: int = 0
    image: TowerSpec | None = None
    text: TowerSpec | None = None
    image_views: Mapping[str, ViewSpec] = field(default_factory=dict)
    text_views: Mapping[str, ViewSpec] = field(default_factory=dict)
    heads: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Width of each output of each head built so far."""
    validation_data: str | None = None
    """Held-out shards, or a folder, that the training set knows of."""
    background: str = BACKGROUND
    """What transparent pictures are put on: a colour's name, or ``#rrggbb``."""

    def views(self, modality: Modality) -> Mapping[str, ViewSpec]:
        """The view groups on offer in one modality."""
        return self.image_views if modality == "image" else self.text_views


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where the run is: ``step`` counts optimiser steps from 0, the one under way."""

    step: int
    total_steps: int
    steps_per_epoch: int = 1

    @property
    def fraction(self) -> float:
        """Share of the run that is done, 0 at the first step."""
        return self.step / max(1, self.total_steps)

    @property
    def epoch(self) -> float:
        """Epochs done, with fractions."""
        return self.step / max(1, self.steps_per_epoch)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterRule:
    """What the optimiser should know of some parameters of a part.

    ``match`` is an fnmatch pattern over parameter names as seen from the part. The last matching rule
    that sets a value wins; factors multiply the run's own learning rate and weight decay.
    """

    match: str
    lr_scale: float | None = None
    weight_decay_scale: float | None = None
    frozen_epochs: float | None = None
    """No update before this epoch; ``math.inf`` freezes for good and saves the backward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """What a loss returns: ``terms`` are summed and trained on, ``metrics`` are only logged.

    Every value is a scalar tensor and a mean over this rank's samples.
    """

    terms: Mapping[str, Tensor]
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """All that a loss may read in one step."""

    views: Views
    student: Features
    teacher: Features | None
    gathered: Mapping[Role, Features]
    """Features asked for with ``gathered=True``: [V, ranks x B, ...] in rank order, gradients included."""
    progress: Progress
    head: Callable[..., HeadOutput]
    """``head(name, *args, **kwargs)`` calls a head's ``respond`` method (heads conditioned on other samples)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What an evaluator found: named numbers, and pictures as uint8 [3, H, W]."""

    metrics: Mapping[str, float]
    pictures: Mapping[str, Tensor] = field(default_factory=dict)
