"""The plugin contract on one page: what each kind of part must do.

A part is a class, offered by an entry point of its group (``cosmos_ssl.losses`` and so on). Its constructor takes one
``Spec`` and typed keyword-only arguments, which *are* its YAML options; raise ``ValueError`` there for values that make
no sense. Types such as ``Size`` and ``Share`` bound numbers. ``type: NAME`` picks a part, ``DIST:NAME`` says whose. An
option that says where something lies has the type ``Location``, one that changes nothing of what is computed
``Aside[...]``: a run goes on though they differ, while every other option is part of what it is.

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

Shape letters as in ``cosmos_ssl.api.views``.
"""

from cosmos_ssl import API_VERSION
from cosmos_ssl.api.augmenter import Augmenter
from cosmos_ssl.api.data import Dataset, Tokenizer
from cosmos_ssl.api.evaluator import Encoder, Evaluation, Evaluator
from cosmos_ssl.api.head import Head
from cosmos_ssl.api.loss import Features, GroupFeatures, Loss, LossOutput, Need, StepContext, normalise
from cosmos_ssl.api.part import ParameterRule, Part, Progress, Spec, TowerSpec, ViewSpec
from cosmos_ssl.api.teacher import Teacher
from cosmos_ssl.api.tower import GroupPlan, Tower
from cosmos_ssl.api.views import (
    ALL,
    CropGroup,
    HeadOutput,
    ImageCrops,
    ImageGroup,
    Kind,
    Modality,
    Role,
    Sample,
    TextGroup,
    Views,
)
from cosmos_ssl.bounds import Count, Few, Pixels, Share, Size, Strength, Temperature, Whole
from cosmos_ssl.errors import BadSample, DataError, PluginError, UserError
from cosmos_ssl.marks import Aside, Location

__all__ = [
    "ALL",
    "API_VERSION",
    "Aside",
    "Augmenter",
    "BadSample",
    "Count",
    "CropGroup",
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
