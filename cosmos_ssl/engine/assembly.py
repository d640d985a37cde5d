"""What a trainer works on: all parts of a run, built and wired, whoever built them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cosmos_ssl.api import Augmenter, Dataset, Evaluator, Modality, Spec, Teacher, Tokenizer
from cosmos_ssl.models.model import Model
from cosmos_ssl.models.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledEvaluator:
    """An evaluator and how often it runs (None: at the end alone; it always runs at the end)."""

    evaluator: Evaluator
    every_epochs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """The built parts of a run. ``build_model`` makes another model of the same config (for the teacher)."""

    spec: Spec
    dataset: Dataset | None
    """None for a model that only encodes."""
    tokenizer: Tokenizer | None
    augmenters: Mapping[Modality, Augmenter]
    model: Model
    build_model: Callable[[], Model]
    teacher: Teacher
    update_when: Literal["before_optimizer_step", "after_optimizer_step"]
    plan: Plan
    loss_weights: Mapping[str, float]
    evaluators: Mapping[str, ScheduledEvaluator] = field(default_factory=dict)
    frozen: Sequence[str] = ()
    """Parameters that the plan never reaches."""
    start: str = ""
    """For people: what was taken over from ``model.pretrained``."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """Config path of each part -> name, distribution and version."""
