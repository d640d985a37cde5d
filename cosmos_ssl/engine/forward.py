"""The stages of a step up to its losses: augmented views, the features of teacher and student, the losses."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor
from torch.profiler import record_function

from cosmos_ssl.api import Features, HeadOutput, LossOutput, PluginError, Progress, StepContext, Views, value_at
from cosmos_ssl.api.part import describe
from cosmos_ssl.api.views import CroppedViews
from cosmos_ssl.data.order import step_seed
from cosmos_ssl.engine.assembly import Assembly
from cosmos_ssl.engine.exchange import gather_features, moments
from cosmos_ssl.functional import rank
from cosmos_ssl.models.contract import blaming, checked_pixels, untouched
from cosmos_ssl.models.model import Model
from cosmos_ssl.models.plan import Plan
from cosmos_ssl.models.precision import DTYPES

Batch: TypeAlias = CroppedViews | Views
"""What a step takes: as loaded, or finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What the losses of a step came to."""

    loss: Tensor
    """The weighted total; with its graph until the backward pass has run."""
    logs: Mapping[str, Tensor]
    """Scalars: ``loss``, ``loss/NAME``, ``loss/NAME/TERM`` where there are several, ``NAME/METRIC``."""
    moments: Mapping[str, Tensor]
    """Of this rank's features, for ``exchange.spread``."""


class Forward:
    """Runs the stages on one batch, or one micro-batch, of this rank."""

    def __init__(self, assembly: Assembly, *, precision: str = "fp32", device: torch.device | None = None) -> None:
        self.assembly = assembly
        self.device = device or torch.device("cpu")
        self.dtype = DTYPES[precision]
        self.resting: frozenset[str] = frozenset()
        """Losses that have no part in this step."""
        self._plans = {self.resting: assembly.plan}
        self._proven: set[frozenset[str]] = set()

    @property
    def _models(self) -> list[Model]:
        """Student and, where there is one, teacher."""
        teacher = self.assembly.teacher
        return [self.assembly.model, *([cast(Model, teacher.model)] if teacher.present else [])]

    @property
    def plan(self) -> Plan:
        """What this step computes."""
        return self._plans[self.resting]

    @property
    def proven(self) -> bool:
        """Whether a step of this plan has ended: what parts do is watched most closely in the first."""
        return self.resting in self._proven

    def prove(self) -> None:
        """A step of this plan has ended."""
        self._proven.add(self.resting)

    def rest(self, resting: frozenset[str]) -> None:
        """Compute nothing for these losses from now on."""
        self.resting = resting
        if resting not in self._plans:
            self._plans[resting] = self.assembly.plan_without(resting)

    def watch(self) -> None:
        """Have parts refused, until a step has ended, that change what they are given."""
        for model in self._models:
            model.strict = not self.proven

    def tell(self, progress: Progress) -> None:
        """Let towers, heads and augmenters know where the run is, and which losses rest there."""
        self.rest(self.assembly.resting(progress))
        for model in self._models:
            model.set_progress(progress)
        for modality, augmenter in self.assembly.augmenters.items():
            with blaming(augmenter, f"augmenters.{modality}"):
                augmenter.set_progress(progress)

    def seed(self, progress: Progress, micro_batch: int = 0) -> None:
        """Seed the device: its randomness is a function of seed, step, micro-batch and rank, and needs no storing."""
        torch.manual_seed(step_seed(self.assembly.spec.seed, progress.step, micro_batch, rank()))

    @torch.no_grad()
    @record_function("augment")
    def augment(self, batch: Batch) -> Views:
        """Photometric work on the device: uint8 crops to normalised float views; what is finished stays as it is."""
        if isinstance(batch, Views):
            return batch
        image = {}
        if batch.image:
            augmenter = self.assembly.augmenters["image"]
            read = {name for name in batch.image if not self.resting or self.plan.reads("image", name)}
            with blaming(augmenter, "augmenters.image"), nullcontext() if self.proven else untouched(batch.image):
                image = {
                    name: checked_pixels(group, augmenter.finish(group))
                    for name, group in batch.image.items()
                    if name in read
                }
        return Views(keys=batch.keys, image=image, text=batch.text, extras=batch.extras)

    @torch.no_grad()
    @record_function("teacher forward")
    def teacher(self, views: Views) -> Features | None:
        """Return what the plan wants of the teacher, if it wants anything."""
        if self.plan.teacher is None:
            return None
        model = cast(Model, self.assembly.teacher.model)
        with self._autocast():
            return model.encode(views, self.plan.teacher)

    @record_function("student forward")
    def student(self, views: Views) -> Features:
        """The student's towers and heads."""
        with self._autocast():
            return self.assembly.model.encode(views, self.plan.student)

    @record_function("losses")
    def losses(self, views: Views, student: Features, teacher: Features | None, progress: Progress) -> Result:
        """Every loss once over the features of all ranks, and the weighted total."""
        context = StepContext(
            views=views,
            student=student,
            teacher=teacher,
            gathered=gather_features(self.plan, student, teacher),
            progress=progress,
            head=self._call_head,
        )
        outputs = self.assembly.model.compute_losses(context, self.plan.student, self.resting)
        weights = {name: value_at(self.assembly.loss_weights[name], progress) for name in outputs}
        zero = torch.zeros((), device=self.device)
        total = torch.stack([weights[name] * sum(o.terms.values(), zero) for name, o in outputs.items()]).sum()
        if torch.is_grad_enabled() and not (self.proven and total.requires_grad):
            self._check_trained(outputs)
        return Result(loss=total, logs=_logs(total, outputs), moments=moments(student))

    def _check_trained(self, outputs: Mapping[str, LossOutput]) -> None:
        """Raise PluginError for losses that nothing can be trained by, unless they are zero: then they may be off."""
        silent = {n: o for n, o in outputs.items() if not any(term.requires_grad for term in o.terms.values())}
        wrong = [
            name
            for name, output in silent.items()
            if len(silent) == len(outputs) or any(term != 0 for term in output.terms.values())
        ]
        if wrong:
            named = ", ".join(describe(self.assembly.model.loss(name), f"losses.{name}") for name in wrong)
            raise PluginError(
                f"{named} returned terms without a gradient, expected terms computed from the student's features"
            )

    def _call_head(self, name: str, *args: object, **kwargs: object) -> HeadOutput:
        with self._autocast():
            return self.assembly.model.respond(name, *args, **kwargs)

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)


def _logs(total: Tensor, outputs: Mapping[str, LossOutput]) -> dict[str, Tensor]:
    logs = {"loss": total.detach()}
    for name, output in outputs.items():
        terms = {term: value.detach() for term, value in output.terms.items()}
        logs[f"loss/{name}"] = torch.stack(list(terms.values())).sum()
        if len(terms) > 1:
            logs |= {f"loss/{name}/{term}": value for term, value in terms.items()}
        logs |= {f"{name}/{metric}": value.detach() for metric, value in output.metrics.items()}
    return logs
