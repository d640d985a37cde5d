"""DOC api.part"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cosmos_ssl.api.views import Modality
from cosmos_ssl.pictures import BACKGROUND


class Part:
    """Base of all parts.

    For messages: what the config calls it, and, of other packages' parts, the package and its version.
    """

    part_name: str = ""
    part_source: str = ""


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
class TowerSpec:
    """What the rest of the model may know of a tower."""

    width: int
    image_size: int = 0
    patch_size: int = 0
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewSpec:
    """One view group that an augmenter offers."""

    views: int
    size: int | None = None
    """Side of the square image views, in pixels."""
    masks: bool = False


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


def describe(part: Part, place: str) -> str:
    """A part for a message: its place in the config, and whose it is unless ours."""
    return f"{place} ({part.part_source})" if part.part_source else place
