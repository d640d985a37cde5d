"""The plugin contract: what each kind of part must do, a page for each kind of author, with a worked example.

A part is a class, offered by an entry point of its group (``cosmos_ssl.losses`` and so on) and named by a config:
``type: NAME`` picks it, ``DIST:NAME`` says whose. All names are imported from here. Which file to read:

- ``loss``: scalar terms of a step's features (and ``Need``, ``Features``, ``StepContext``, unit vectors: ``normalise``)
- ``head``: features to named outputs
- ``tower``: the views of one modality to features
- ``augmenter``: the views of a sample
- ``teacher``: a second model, and how it follows the student
- ``optimizer``: how gradients move parameters
- ``schedule``: how a number moves over a run (and ``Curve``, ``value_at``)
- ``data``: data sets and tokenizers
- ``evaluator``: numbers and pictures of a model
- ``writer``: where a run's numbers and pictures go
- ``callback``: what is done beside the steps of a run
- ``part``: what all of them share: options, ``Spec``, ``Progress``
- ``views``: what a batch is made of, with the letters of its shapes
"""

from cosmos_ssl import API_VERSION
from cosmos_ssl.api.augmenter import Augmenter
from cosmos_ssl.api.callback import Callback, CallbackContext, floats_of, set_float
from cosmos_ssl.api.data import Dataset, FileBacked, IndexedDataset, Tokenizer
from cosmos_ssl.api.evaluator import Encoder, Evaluation, Evaluator
from cosmos_ssl.api.head import AttendingHead, Head, MatchingHead
from cosmos_ssl.api.loss import Features, GroupFeatures, Loss, LossOutput, Need, StepContext, normalise
from cosmos_ssl.api.optimizer import Optimizer
from cosmos_ssl.api.part import ParameterRule, Part, Progress, Spec, TowerSpec, ViewSpec
from cosmos_ssl.api.schedule import Schedule, value_at
from cosmos_ssl.api.teacher import Teacher
from cosmos_ssl.api.tower import DenseTower, GroupPlan, LayeredTower, Tower
from cosmos_ssl.api.views import (
    ALL,
    CropGroup,
    HeadOutput,
    Hidden,
    ImageCrops,
    ImageGroup,
    Kind,
    Modality,
    Role,
    Sample,
    TextGroup,
    Views,
)
from cosmos_ssl.api.writer import RunInfo, Writer
from cosmos_ssl.bounds import Count, Curve, Few, Pixels, Share, Size, Strength, Temperature, Whole
from cosmos_ssl.errors import BadSample, DataError, PluginError, UserError
from cosmos_ssl.files import LineFile
from cosmos_ssl.marks import Aside, Location

__all__ = [
    "ALL",
    "API_VERSION",
    "Aside",
    "AttendingHead",
    "Augmenter",
    "BadSample",
    "Callback",
    "CallbackContext",
    "Count",
    "CropGroup",
    "Curve",
    "DataError",
    "Dataset",
    "DenseTower",
    "Encoder",
    "Evaluation",
    "Evaluator",
    "Features",
    "Few",
    "FileBacked",
    "GroupFeatures",
    "GroupPlan",
    "Head",
    "HeadOutput",
    "Hidden",
    "ImageCrops",
    "ImageGroup",
    "IndexedDataset",
    "Kind",
    "LayeredTower",
    "LineFile",
    "Location",
    "Loss",
    "LossOutput",
    "MatchingHead",
    "Modality",
    "Need",
    "Optimizer",
    "ParameterRule",
    "Part",
    "Pixels",
    "PluginError",
    "Progress",
    "Role",
    "RunInfo",
    "Sample",
    "Schedule",
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
    "Writer",
    "floats_of",
    "normalise",
    "set_float",
    "value_at",
]
