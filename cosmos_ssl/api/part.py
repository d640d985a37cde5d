"""What parts of every kind share: how they are built, what they may know of the model around them, and options.

A part is a class. A config picks it by ``type`` and builds it as ``Part(spec, **options)``::

    def __init__(self, spec: Spec, *, head: str, temperature: Temperature = 0.1, file: Location | None = None) -> None:
        '''Raises ValueError for a head that is not there.

        head: the head that is read.
        temperature: what its outputs are divided by.
        file: where the prototypes lie.
        '''

The keyword-only arguments *are* its YAML options: each has a type, and a line ``name: what it is`` in the docstring of
the constructor or of the class. They are checked before anything is built:

- Numbers are finite; ``Count``, ``Whole``, ``Few``, ``Size``, ``Pixels``, ``Share``, ``Strength`` and ``Temperature``
  bound them too; ``Share | Curve[Share]`` may move over the run (``cosmos_ssl.api.schedule``). For what no type says,
  raise ``ValueError("head: no head 'x'")``: the option, and what is wrong.
- ``Location`` says where something lies, ``Aside[...]`` what changes nothing of what is computed: a run goes on though
  they differ, while every other option is part of what it is.

A part is built twice: on the meta device, where the config is checked, and for the run; so give tensors no device. Only
its parameters and buffers go into a checkpoint: what else it knows must follow from options, ``spec`` and progress
(``Part.set_progress``)::

    def set_progress(self, progress: Progress) -> None:  # a tower that drops half of the patches, but not in the end
        self.dropped = 0.5 if progress.fraction < 0.9 else 0.0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cosmos_ssl.api.views import Modality
from cosmos_ssl.pictures import BACKGROUND


class Part:
    """Base of all parts.

    For messages: what the config calls it, and, of other packages' parts, the package and its version.
    """

    part_name: str = ""
    part_source: str = ""

    def notice(self) -> str:
        """One line that whoever starts a run should read of how this part is set; none by default."""
        return ""

    def set_progress(self, progress: Progress) -> None:
        """Learn where the run is, before each step: towers, heads and augmenters (a worker: of the batch's step).

        What a part makes of it follows from it alone, so that a run that goes on is the same run. Nobody tells it in
        evaluation, nor of a model that is loaded: what it computes in evaluation mode must not depend on it.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerSpec:
    """What the rest of the model may know of a tower."""

    width: int
    """W, of pooled features and tokens."""
    image_size: int = 0
    """Side of a whole picture in pixels: what evaluation prepares."""
    patch_size: int = 0
    """Side of a patch in pixels."""
    vocab_size: int = 0
    """Token ids that a text tower knows, where these may be fewer than the tokenizer's; 0: as many."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """What is taken from each channel of a picture in 0..1, before it is divided by ``std``."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    resize: Literal["crop", "squash"] = "crop"
    """How evaluation makes a picture square: the shorter side resized and the middle cut out, or both sides resized."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """By which evaluation resizes."""

    def __post_init__(self) -> None:
        """Raise ValueError for a deviation that nothing can be divided by."""
        if not min(self.std) > 0:
            raise ValueError(f"std: {list(self.std)} has a number that is not above zero")


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewSpec:
    """One view group that an augmenter offers."""

    views: int
    """V, of each sample."""
    size: int | None = None
    """Side of the square image views, in pixels; None where it varies from step to step, or of texts."""
    masks: bool = False
    """Whether each view comes with a mask of patches, or of tokens, to hide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a part may know of the model around it: the first argument of every part's constructor.

    Parts are built in the order tokenizer, towers, augmenters, data set, heads (as listed), losses, teacher,
    evaluators; each sees what was built before it, and defaults in the place of the rest.
    """

    embed_dim: int
    """D, the width that the towers share."""
    batch_size: int = 1
    """Samples of the global batch."""
    steps_per_epoch: int = 1
    epochs: int = 1
    seed: int = 0
    attention: str = "auto"
    """The backend for ``cosmos_ssl.models.attention``."""
    kernels: str = "auto"
    """Whether kernels of one's own may stand for PyTorch's on CUDA (``auto``), or not (``plain``)."""
    has_teacher: bool = False
    context_length: int = 0
    """S, tokens of a padded text."""
    vocab_size: int = 0
    """Token ids of the tokenizer."""
    image: TowerSpec | None = None
    text: TowerSpec | None = None
    image_views: Mapping[str, ViewSpec] = field(default_factory=dict)
    """The image views on offer, by group (``global``, ``local``, ...)."""
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

    ``match`` is an fnmatch pattern over parameter names as seen from the part. The last matching rule that sets a value
    wins; factors multiply the run's own learning rate and weight decay.
    """

    match: str
    lr_scale: float | None = None
    weight_decay_scale: float | None = None
    decay_1d: bool | None = None
    """Whether parameters with fewer than two dimensions decay, too."""
    frozen_epochs: float | None = None
    """No update before this epoch; ``math.inf`` freezes for good and saves the backward pass."""


def describe(part: Part, place: str) -> str:
    """A part for a message: its place in the config, and whose it is unless ours."""
    return f"{place} ({part.part_source})" if part.part_source else place
