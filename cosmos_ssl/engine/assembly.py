"""What a trainer works on: all parts of a run, built and wired, whoever built them; its order of samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.api import (
    Augmenter,
    Callback,
    Curve,
    Dataset,
    Evaluator,
    Modality,
    Optimizer,
    Progress,
    Schedule,
    Spec,
    Teacher,
    Tokenizer,
    Tower,
    Writer,
)
from cosmos_ssl.config import Config
from cosmos_ssl.data.loader import Loader
from cosmos_ssl.data.order import Order
from cosmos_ssl.models.model import Model
from cosmos_ssl.models.plan import Plan, make_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledEvaluator:
    """An evaluator and how often it runs (None: at the end alone; it always runs at the end)."""

    evaluator: Evaluator
    every_epochs: int | None = None


def make_order(config: Config, shard_sizes: NDArray[np.int64]) -> Order:
    """The order in which a run of this config takes the samples of shards of these sizes. Raises UserError."""
    training = config.training
    shuffle_samples = config.loader.shuffle_samples
    return Order(
        shard_sizes, training.batch_size, lanes=config.lanes, shuffle_samples=shuffle_samples, seed=training.seed
    )


def make_loader(assembly: Assembly, config: Config, order: Order, *, rank: int, world: int, pin: bool) -> Loader:
    """What reads the batches of one rank; ``pin``: into memory that a GPU copies from."""
    assert assembly.dataset is not None, "a model built to be read, not trained"
    return Loader(
        assembly.dataset,
        order,
        image=assembly.augmenters.get("image"),
        text=assembly.augmenters.get("text"),
        tokenizer=assembly.tokenizer,
        workers=config.loader.workers,
        rank=rank,
        world=world,
        prefetch=config.loader.prefetch,
        pin_memory=pin,
        background=config.model.background,
        total_steps=total_steps(config, order),
    )


def total_steps(config: Config, order: Order) -> int:
    """Steps of a whole run."""
    wanted = config.schedule.epochs * order.steps_per_epoch
    return min(wanted, config.schedule.max_steps or wanted)


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
    loss_weights: Mapping[str, float | Curve[float]]
    optimizer: Optimizer
    schedule: Schedule
    """Of the learning rate."""
    evaluators: Mapping[str, ScheduledEvaluator] = field(default_factory=dict)
    writers: Mapping[str, Writer] = field(default_factory=dict)
    callbacks: Mapping[str, Callback] = field(default_factory=dict)
    frozen: Sequence[str] = ()
    """Parameters that the plan never reaches."""
    start: str = ""
    """For people: what was taken over from ``model.pretrained``."""
    notices: Sequence[str] = ()
    """For people: what parts have to say of how they are set (``Part.notice``)."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """Config path of each part -> name, distribution and version."""
    places: Callable[[], Mapping[str, str | None]] = dict
    """Reads what lies at the places that options name (``identity.Identity``)."""
    followed: Model = field(init=False)
    """The student as a teacher gets to see it: without the losses, which are no part of a teacher."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "followed", self.model.with_losses({}))

    def resting(self, progress: Progress) -> frozenset[str]:
        """Losses whose weight moves and is 0 at this step: nothing is computed for them.

        All are computed at a run's first step, where faults of parts are found, and where all would rest.
        """
        found = {
            name for name, weight in self.loss_weights.items() if isinstance(weight, Curve) and not weight.at(progress)
        }
        return frozenset(found if progress.step and len(found) < len(self.loss_weights) else ())

    def plan_without(self, resting: frozenset[str]) -> Plan:
        """What a step computes while these losses rest."""
        heads = {name: self.model.head(name) for name in self.model.heads}
        losses = {name: self.model.loss(name) for name in self.model.losses}
        towers = cast(Mapping[Modality, Tower], self.model.towers)
        return make_plan(self.spec, towers, heads, losses, resting=resting)

    def start_teacher(self) -> None:
        """Start the teacher from the student as it is."""
        self.teacher.start(lambda: self.build_model().with_losses({}), self.followed)
