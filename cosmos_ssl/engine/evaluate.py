"""Evaluation during training: every due evaluator on student and teacher, and on weights that callbacks give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor
from torch.profiler import record_function

from cosmos_ssl.api import Evaluation, Loss
from cosmos_ssl.engine.assembly import Assembly, ScheduledEvaluator
from cosmos_ssl.engine.parallel import gathered
from cosmos_ssl.functional import whole
from cosmos_ssl.models.contract import blaming, checked_evaluation
from cosmos_ssl.models.encoder import ModelEncoder
from cosmos_ssl.models.model import Model


class WatchedEncoder(ModelEncoder):
    """An encoder that tells, before each reading, that the evaluation goes on; what is told may end it."""

    alive: Callable[[], None]

    @contextmanager
    def reading(self) -> Iterator[None]:
        """As ``ModelEncoder``. Raises what ``alive`` raises."""
        self.alive()
        with super().reading():
            yield


def due(evaluators: Mapping[str, ScheduledEvaluator], step: int, steps_per_epoch: int, total_steps: int) -> list[str]:
    """Names of the evaluators that run after ``step`` steps."""

    def is_due(every_epochs: int | None) -> bool:
        return step == total_steps or (
            every_epochs is not None and step > 0 and step % (every_epochs * steps_per_epoch) == 0
        )

    return [name for name, scheduled in evaluators.items() if is_due(scheduled.every_epochs)]


@record_function("evaluation")
def evaluate(
    name: str, assembly: Assembly, alive: Callable[[], None], dtype: torch.dtype | None, *, pictures: bool = True
) -> Evaluation:
    """Run one evaluator on every role; names become ``NAME/ROLE/METRIC``.

    ``alive`` is called before each reading and may raise.
    """
    metrics: dict[str, float] = {}
    drawn: dict[str, Tensor] = {}
    for role, model, weights in _roles(assembly):
        encoder = WatchedEncoder(model, assembly.spec, assembly.tokenizer, dtype=dtype)
        encoder.alive = alive
        torch.manual_seed(assembly.spec.seed)  # an evaluation draws the same numbers whenever it runs
        evaluator = assembly.evaluators[name].evaluator
        with gathered(model), _standing_in(model, weights), blaming(evaluator, f"evaluators.{name}"):
            found = checked_evaluation(evaluator.evaluate(encoder, pictures=pictures))
        metrics |= {f"{name}/{role}/{metric}": float(value) for metric, value in found.metrics.items()}
        drawn |= {f"{name}/{role}/{picture}": value for picture, value in found.pictures.items()}
    return Evaluation(metrics=metrics, pictures=drawn)


def summary(evaluation: Evaluation, each: int = 3) -> str:
    """The first few numbers of every role, on one line."""
    roles: dict[str, list[str]] = {}
    for name, value in evaluation.metrics.items():
        _, role, metric = name.split("/", 2)
        roles.setdefault(role, []).append(f"{metric} {value:.4g}")
    return "; ".join(f"{role} {', '.join(shown[:each])}" for role, shown in roles.items())


def _roles(assembly: Assembly) -> Iterator[tuple[str, Model, Mapping[str, Tensor]]]:
    """Each role, its model, and the weights that stand for the model's own."""
    yield "student", assembly.model, {}
    if assembly.teacher.present:
        losses = cast(Mapping[str, Loss], assembly.model.losses)  # what an encoder tells of them is the student's
        yield "teacher", cast(Model, assembly.teacher.model).with_losses(losses), {}
    for name, part in assembly.callbacks.items():
        with blaming(part, f"callbacks.{name}"):
            weights = part.evaluated()
            if strange := weights.keys() - assembly.model.state_dict().keys():
                raise ValueError(f"evaluated() gives {min(strange)}, which the model has not")
        if weights:
            yield name, assembly.model, weights


@contextmanager
def _standing_in(model: Model, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """While entered, the model computes with these weights, by their names; its own stay as they are."""
    held = {name: x for name, x in (*model.named_parameters(), *model.named_buffers()) if name in weights}
    own = {name: x.data for name, x in held.items()}
    try:
        for name, x in held.items():
            x.data = whole(weights[name])
        yield
    finally:
        for name, x in held.items():
            x.data = own[name]
