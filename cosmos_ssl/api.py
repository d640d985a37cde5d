"""The plugin contract on one page: what each kind of part must do.

A part is a class, offered by an entry point of its group (``cosmos_ssl.losses`` and so on). Its
constructor takes one ``Spec`` and typed keyword-only arguments, which *are* its YAML options; raise
``ValueError`` there for values that make no sense. Types such as ``Size`` and ``Share`` bound numbers. ``type: NAME`` picks a
part, ``DIST:NAME`` says whose. An option that says where something lies has the type ``Location``, one that changes nothing of
what is computed ``Aside[...]``: a run goes on though they differ, while every other option is part of what it is.

A loss in full::

    class Spread(Loss):
        '''Mean squared distance of the student's image views from their sample's mean.'''

        def __init__(self, spec: Spec, *, floor: float = 0.0) -> None:
            super().__init__()
            self.floor = floor

        def requires(self) -> list[Need]:
            return [Need(modality="image", kind="projected")]

        def forward(self, ctx: StepContext) -> LossOutput:
            x = ctx.student.stack("image")  # [V, B, D]
            return LossOutput(terms={"spread": (x - x.mean(0)).square().mean().clamp_min(self.floor)})

Shape letters as in ``cosmos_ssl.types``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cosmos_ssl.errors import BadSample, DataError, PluginError, UserError
from cosmos_ssl.registry import API_VERSION
from cosmos_ssl.registry_bounds import Count, Few, Pixels, Share, Size, Strength, Temperature, Whole
from cosmos_ssl.registry_marks import Aside, Location
from cosmos_ssl.specs import Evaluation, GroupPlan, LossOutput, Need, ParameterRule, Progress, Spec, StepContext, TowerSpec, ViewSpec
from cosmos_ssl.types import (
    ALL,
    Features,
    GroupFeatures,
    HeadOutput,
    ImageCrops,
    ImageGroup,
    Kind,
    Modality,
    Role,
    Sample,
    SampleViews,
    TextGroup,
    Views,
    normalise,
)

__all__ = [
    "ALL",
    "API_VERSION",
    "Aside",
    "Augmenter",
    "BadSample",
    "Count",
    "DataError",
    "Dataset",
    "Encoder",
    "Evaluation",
    "Evaluator",
    "Features",
    "Few",
    "GroupFeatures",
    "GroupPlan",
    "Head",
    "HeadOutput",
    "ImageCrops",
    "ImageGroup",
    "Kind",
    "Location",
    "Loss",
    "LossOutput",
    "Modality",
    "Need",
    "ParameterRule",
    "Part",
    "Pixels",
    "PluginError",
    "Progress",
    "Role",
    "Sample",
    "SampleViews",
    "Share",
    "Size",
    "Spec",
    "StepContext",
    "Strength",
    "Teacher",
    "Temperature",
    "TextGroup",
    "Tokenizer",
    "Tower",
    "TowerSpec",
    "UserError",
    "ViewSpec",
    "Views",
    "Whole",
    "normalise",
]


class Part:
    """Base of all parts. For messages: what the config calls it, and, of other packages' parts, the package and its version."""

    part_name: str = ""
    part_source: str = ""


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


class Tokenizer(Part, ABC):
    """Turns strings into token ids."""

    vocab_size: int
    context_length: int
    pad_id: int

    @abstractmethod
    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids int64 [n, S], padded, and lengths int64 [n] up to and with the end-of-text token."""

    def lengths(self, ids: Tensor) -> Tensor:
        """Tokens of padded texts [..., S] up to and with the end of each, at least 1: what follows are pads."""
        places = torch.arange(1, ids.shape[-1] + 1, device=ids.device)
        return torch.where(ids != self.pad_id, places, 1).amax(-1)

    def decode(self, ids: Sequence[int]) -> list[str]:
        """The readable piece of text behind each id (for pictures)."""
        return [str(i) for i in ids]


class Tower(Part, nn.Module, ABC):
    """Encodes the view groups of one modality, all of them in one call."""

    modality: ClassVar[Modality]
    spec: TowerSpec
    capabilities: frozenset[str] = frozenset()
    """Of ``tokens``, ``masks`` (a mask token), ``packing``, ``pruning`` (last block only where read), ``csa``."""

    @abstractmethod
    def forward(self, groups: Mapping[str, Any], plan: Mapping[str, GroupPlan]) -> dict[str, GroupFeatures]:
        """Encode ``groups[name]`` (ImageGroup, float; or TextGroup) for every name in ``plan``."""

    def check_inputs(self, views: Mapping[str, ViewSpec]) -> None:
        """Raise ValueError where it cannot encode these view groups, or the tokenizer's ids, so that this is known before training."""

    def unread(self, plan: Mapping[str, GroupPlan]) -> Sequence[str]:
        """fnmatch patterns of parameters that this plan never reaches (they are frozen)."""
        return ()

    def parameter_rules(self) -> Sequence[ParameterRule]:
        """Rules of the parameters, depth-dependent ones included."""
        return ()


class Head(Part, nn.Module, ABC):
    """Features, or another head's output, to named outputs; runs on every role that a reader asks for.

    Readers name the outputs that they want (``Need.outputs``), and only those are computed.
    """

    mixes_samples: bool = False
    """True, of a class or an instance, where a sample's output depends on others of the batch (batch norm): bars exact accumulation."""

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


class Loss(Part, nn.Module, ABC):
    """Scalar terms of a step's features. Runs exactly once an optimiser step; owns its scales and biases."""

    calls_heads: ClassVar[bool] = False
    """True where ``forward`` uses ``ctx.head``: bars exact accumulation."""

    @abstractmethod
    def requires(self) -> Sequence[Need]:
        """What ``forward`` reads."""

    @abstractmethod
    def forward(self, ctx: StepContext) -> LossOutput:
        """The terms, each a scalar and a mean over this rank's samples."""

    def after_step(self) -> None:
        """Called once after every optimiser step, on student and teacher alike (clamp a scale here)."""

    def parameter_rules(self) -> Sequence[ParameterRule]:
        """Rules of the parameters."""
        return ()


class Teacher(Part, nn.Module, ABC):
    """Owns a second model of the same config, or none. Never receives gradients."""

    present: ClassVar[bool] = True
    """False for the part that stands for 'no teacher'."""
    model: nn.Module

    def prepare(self) -> None:
        """Look for what ``start`` reads, before training: a missing file is better found now. Raises UserError."""
        return

    def start(self, build: Callable[[], nn.Module], student: nn.Module) -> None:
        """Make the teacher's model: rebuilt from the config, then loaded with the student's start values."""
        self.model = build()
        self.model.load_state_dict(student.state_dict())
        self.model.requires_grad_(False).eval()

    @abstractmethod
    def update(self, student: nn.Module, progress: Progress) -> Mapping[str, float]:
        """Move the teacher once a step; return what is worth logging (the momentum)."""


class Dataset(Part, ABC):
    """Random access to training samples, laid out in shards (a flat set is one shard)."""

    validation_data: str | None = None
    """Held-out shards, or a folder, that belong to this set, for evaluators that are given none."""

    @abstractmethod
    def prepare(self) -> None:
        """Write or index what is missing; called once, on one process, before any sample is read.

        What takes many minutes calls ``cosmos_ssl.functional.alive()`` now and then: a preparation of which nothing is heard for
        ``training.timeout_minutes`` ends the run.
        """

    def check_exists(self) -> bool:
        """Whether the data are there as far as a glance tells, before ``prepare``; False where that cannot be told, or it makes them.

        For a dry run, which indexes nothing. Raises DataError where something is plainly missing.
        """
        return False

    @property
    @abstractmethod
    def shard_sizes(self) -> NDArray[np.int64]:
        """Samples of each shard, int64 [shards]; sample indices run through the shards in order."""

    @abstractmethod
    def read(self, index: int) -> Sample:
        """Sample ``index``. Raises BadSample for a faulty one, OSError where storage fails."""

    def describe(self, index: int) -> str:
        """Where sample ``index`` lies (the shard's name), for counts and messages."""
        return f"sample {index}"

    def identity(self) -> Mapping[str, Any]:
        """What makes this set this set (names, sizes, counts and contents of shards), for the run's identity; mappings may be nested.

        What is not known, at the start of a run or when it goes on, is left out: it is no difference then.
        """
        return {"samples": int(self.shard_sizes.sum())}


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
        """Normalised pictures -> what ``match`` wants to know of each, [B, ...]; unit vectors where no head says otherwise."""
        ...

    def match_text(self, tokens: Tensor) -> Tensor:
        """Token ids -> what ``match`` wants to know of each text, [T, ...]; unit vectors where no head says otherwise."""
        ...

    def match(self, images: Tensor, texts: Tensor) -> Tensor:
        """How well pictures [B, ...] and texts [T, ...] match, [B, T]: a head's ``match``, by default the dot product."""
        ...

    def preprocess(self, image: Any) -> Tensor:
        """A PIL image, or uint8 [3, H, W]: shorter side resized bicubic, centre crop, normalised [3, H, W]."""
        ...

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Strings -> token ids [n, S]."""
        ...


class Evaluator(Part, ABC):
    """A model and data to named numbers and pictures. Reserved option: ``every_epochs``."""

    modalities: ClassVar[tuple[Modality, ...]] = ("image", "text")
    """The towers it needs."""

    def prepare(self) -> None:
        """Look at the data, once before training: a missing file is better found now. Raises DataError."""

    @abstractmethod
    def evaluate(self, encoder: Encoder, *, pictures: bool = False) -> Evaluation:
        """Evaluate one role's model; metric names as OpenCLIP's (``image_to_text_R@1``)."""
