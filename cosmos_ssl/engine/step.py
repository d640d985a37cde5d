"""The training step: from a batch of views to gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.profiler import record_function

from cosmos_ssl.api import (
    ALL,
    Features,
    GroupFeatures,
    HeadOutput,
    LossOutput,
    Modality,
    Need,
    PluginError,
    Progress,
    Role,
    StepContext,
    Views,
)
from cosmos_ssl.api.views import map_tensors
from cosmos_ssl.engine.assembly import Assembly
from cosmos_ssl.engine.distributed import GradientMean
from cosmos_ssl.errors import listed
from cosmos_ssl.functional import all_sum, gather_many, rank, world_size
from cosmos_ssl.models.contract import blaming, checked_pixels, describe, untouched
from cosmos_ssl.models.model import Model
from cosmos_ssl.models.precision import DTYPES


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step leaves behind besides gradients, detached."""

    loss: Tensor
    logs: Mapping[str, Tensor]
    """Scalars."""
    moments: Mapping[str, Tensor]
    """By modality [2, D]: mean and mean square of this rank's unit features, for ``spread``."""


class Step:
    """Forward and backward over one global batch's share; gradients stay in ``.grad``.

    ``micro_batch_size`` bounds the samples that towers and heads encode at once. It changes memory, not
    the result: losses see the whole batch's outputs once, then towers and heads encode each
    micro-batch again and receive the gradients of their outputs.
    """

    def __init__(
        self,
        assembly: Assembly,
        *,
        precision: str = "fp32",
        micro_batch_size: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.assembly = assembly
        self.model = assembly.model
        self.teacher = assembly.teacher
        self.plan = assembly.plan
        self.dtype = DTYPES[precision]
        self.micro_batch_size = micro_batch_size
        self.device = device or torch.device("cpu")
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._reached = False
        self._mean = GradientMean(p for p in self.model.parameters() if p.requires_grad) if world_size() > 1 else None
        if micro_batch_size is not None:
            refuse_accumulation(assembly)

    def __call__(self, views: Views, progress: Progress, scaler: torch.amp.GradScaler | None = None) -> StepResult:
        """Run one step on ``views`` (uint8 as loaded, or float and finished), on the device."""
        self.model.zero_grad(set_to_none=True)
        for model in (self.model, *([self.teacher.model] if self.teacher.present else [])):
            cast(Model, model).strict = not self._reached  # at the first step alone
        self._buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        self._seed(progress, 0)
        views = self.finish(views)
        teacher = self.teacher_features(views)
        if self.micro_batch_size is None or self.micro_batch_size >= len(views):
            student = self.encode(views)
            result = self.losses(views, student, teacher, progress)
            _backward(result.loss, scaler)
        else:
            result = self._accumulate(views, teacher, progress, scaler)
        if not self._reached:
            self._check_reached()
        if self._mean is not None:
            with record_function("gradient mean"):
                self._mean.finish()
        return replace(result, loss=result.loss.detach())

    # ------------------------------------------------------------------ stages

    @torch.no_grad()
    @record_function("augment")
    def finish(self, views: Views) -> Views:
        """Photometric work on the device: uint8 crops to normalised float views."""
        augmenter = self.assembly.augmenters.get("image")
        if augmenter is None:
            return views
        crops = {name: group for name, group in views.image.items() if not group.pixels.is_floating_point()}
        with blaming(augmenter, "augmenters.image"), nullcontext() if self._reached else untouched(crops):
            finished = {name: checked_pixels(group, augmenter.finish(group)) for name, group in crops.items()}
        return replace(views, image={**views.image, **finished})

    @torch.no_grad()
    @record_function("teacher forward")
    def teacher_features(self, views: Views) -> Features | None:
        """What the plan wants of the teacher."""
        if self.plan.teacher is None:
            return None
        with self._autocast():
            return self.teacher.model.encode(views, self.plan.teacher)  # type: ignore[operator, no-any-return]

    @record_function("student forward")
    def encode(self, views: Views) -> Features:
        """The student's towers and heads."""
        with self._autocast():
            return self.model.encode(views, self.plan.student)

    @record_function("losses")
    def losses(self, views: Views, student: Features, teacher: Features | None, progress: Progress) -> StepResult:
        """Every loss once, and the weighted total. The loss still carries its graph."""
        context = StepContext(
            views=views,
            student=student,
            teacher=teacher,
            gathered=self._gather(student, teacher),
            progress=progress,
            head=self._call_head,
        )
        outputs = self.model.compute_losses(context)
        weights = self.assembly.loss_weights
        total = torch.stack(
            [
                weights[name] * sum(output.terms.values(), torch.zeros((), device=self.device))
                for name, output in outputs.items()
            ]
        ).sum()
        if torch.is_grad_enabled() and not (self._reached and total.requires_grad):
            self._check_trained(outputs)
        return StepResult(loss=total, logs=_logs(total, outputs), moments=_moments(student))

    @torch.no_grad()
    def find_unsound(self, views: Views, progress: Progress) -> str:
        """The first part whose output for this batch is not finite, for a message; empty where those of all but losses
        are.

        Encodes the batch once more: for a step that failed. Call ``restore_buffers`` after it.
        """
        size = self.micro_batch_size or len(views)
        for number, start in enumerate(range(0, len(views), size)):
            self._seed(progress, number)
            part = self.finish(views.slice(start, start + size))
            encoded = (
                ("the teacher's ", self.teacher_features(part)),
                ("", self.encode(part)),
            )  # in full: heads may wait for other ranks
            if not all(_finite(group.pixels) for group in part.image.values()):
                return describe(self.assembly.augmenters["image"], "augmenters.image")
            for whose, features in encoded:
                found = _unsound(features) if features is not None else None
                if found is not None:
                    return whose + self.model.parts().get(found, found)
        return ""

    def restore_buffers(self) -> None:
        """Undo what the last step moved in buffers (for a step that is skipped)."""
        for buffer, before in self._buffers:
            buffer.copy_(before)

    def _check_trained(self, outputs: Mapping[str, LossOutput]) -> None:
        """Raise PluginError for losses that nothing can be trained by, unless they are zero: then they may be off."""
        silent = {n: o for n, o in outputs.items() if not any(term.requires_grad for term in o.terms.values())}
        wrong = [
            n for n, o in silent.items() if len(silent) == len(outputs) or any(term != 0 for term in o.terms.values())
        ]
        if wrong:
            named = ", ".join(describe(self.model.loss(name), f"losses.{name}") for name in wrong)
            raise PluginError(
                f"{named} returned terms without a gradient, expected terms computed from the student's features"
            )

    def _check_reached(self) -> None:
        """Raise PluginError, at the first step, for trained parameters without a gradient: data parallelism would wait
        for it.
        """
        missed = [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and parameter.grad is None
        ]
        if missed:
            parts = self.model.parts().items()
            owners = [described for prefix, described in parts if any(name.startswith(f"{prefix}.") for name in missed)]
            raise PluginError(
                f"{', '.join(owners)}: no gradient reaches {listed(missed, limit=1)}. Let a loss read what they "
                f"compute, or freeze them: optimizer.rules: [{{match: '{missed[0]}', frozen: true}}]"
            )
        self._reached = True

    # ------------------------------------------------------------------ exact accumulation

    def _accumulate(
        self, views: Views, teacher: Features | None, progress: Progress, scaler: torch.amp.GradScaler | None
    ) -> StepResult:
        """Encode micro-batches without graph, losses once, encode again with the outputs' gradients."""
        assert self.micro_batch_size is not None
        if self._mean is not None:
            self._mean.on = False  # gradients add up here first, and are averaged once
        starts = range(0, len(views), self.micro_batch_size)
        parts = [views.slice(start, start + self.micro_batch_size) for start in starts]
        encoded: list[Features] = []
        with torch.no_grad():
            for number, part in enumerate(parts):
                self._seed(progress, number)
                encoded.append(self.encode(part))
        student = map_tensors(_join(encoded), lambda tensor: tensor.detach().requires_grad_(tensor.is_floating_point()))
        result = self.losses(views, student, teacher, progress)
        _backward(result.loss, scaler)
        for number, part in enumerate(parts):
            self._seed(progress, number)
            outputs = list(_tensors(self.encode(part)))
            leaves = list(_tensors(student))
            start = starts[number]
            pairs = [
                (output, leaf.grad[:, start : start + output.shape[1]])
                for output, leaf in zip(outputs, leaves, strict=True)
                if leaf.grad is not None and output.requires_grad
            ]
            with record_function("backward"):
                torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs])
        return result

    # ------------------------------------------------------------------ what the stages stand on

    def _gather(self, student: Features, teacher: Features | None) -> dict[Role, Features]:
        """The planned features and head outputs of all ranks, in one collective."""
        places: dict[tuple[Role, str, str, str], Tensor] = {}
        if self.plan.teacher is not None and teacher is not None:
            places |= {
                ("teacher", *place): tensor for place, tensor in _gathered_places(self.plan.teacher.gathered, teacher)
            }
        places |= {
            ("student", *place): tensor for place, tensor in _gathered_places(self.plan.student.gathered, student)
        }
        roles: tuple[Role, ...] = ("student", "teacher")
        found: dict[Role, dict[str, dict[str, dict[str, Tensor]]]] = {
            role: {"image": {}, "text": {}, "heads": {}} for role in roles
        }
        for (role, section, name, kind), tensor in zip(places, gather_many(list(places.values()), dim=1), strict=True):
            found[role][section].setdefault(name, {})[kind] = tensor
        local = {"student": student, "teacher": teacher}
        return {role: _features(sections, local[role]) for role, sections in found.items()}

    def _call_head(self, name: str, *args: object, **kwargs: object) -> HeadOutput:
        with self._autocast():
            return self.model.respond(name, *args, **kwargs)

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def _seed(self, progress: Progress, micro_batch: int) -> None:
        """Device randomness is a function of (seed, step, micro-batch, rank): nothing of it needs storing."""
        torch.manual_seed(hash((self.assembly.spec.seed, progress.step, micro_batch, rank())) & 0x7FFF_FFFF_FFFF_FFFF)


@record_function("backward")
def _backward(loss: Tensor, scaler: torch.amp.GradScaler | None) -> None:
    (loss if scaler is None else scaler.scale(loss)).backward()


def _logs(total: Tensor, outputs: Mapping[str, LossOutput]) -> dict[str, Tensor]:
    """``loss``, ``loss/NAME``, ``loss/NAME/TERM`` where there are several, ``NAME/METRIC``."""
    logs = {"loss": total.detach()}
    for name, output in outputs.items():
        terms = {term: value.detach() for term, value in output.terms.items()}
        logs[f"loss/{name}"] = torch.stack(list(terms.values())).sum()
        if len(terms) > 1:
            logs |= {f"loss/{name}/{term}": value for term, value in terms.items()}
        logs |= {f"{name}/{metric}": value.detach() for metric, value in output.metrics.items()}
    return logs


def spread(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Collapse signs: standard deviation of unit features over the global batch x sqrt(D); 1 is isotropic, 0 collapsed.

    A collective: all ranks call it.
    """
    if not moments:
        return {}
    mean, mean_square = all_sum(torch.cat(list(moments.values()), 1)) / world_size()
    deviation = (mean_square - mean**2).clamp(min=0).sqrt()
    parts = deviation.split([own.shape[1] for own in moments.values()])
    return {f"spread/{modality}": part.mean() * len(part) ** 0.5 for modality, part in zip(moments, parts, strict=True)}


@torch.no_grad()
def _moments(student: Features) -> dict[str, Tensor]:
    found = {}
    for modality, groups in (("image", student.image), ("text", student.text)):
        features = next((g for g in groups.values() if g.projected is not None), None)
        if features is not None:
            unit = features.unit[0].double()
            found[modality] = torch.stack([unit.mean(0), unit.square().mean(0)])
    return found


def _gathered_places(needs: Sequence[Need], features: Features) -> Iterator[tuple[tuple[str, str, str], Tensor]]:
    """Where the gathered needs of one role lie: (modality or ``heads``, group or head, kind or output), and what lies
    there.
    """
    for need in needs:
        if need.head is not None:
            given = features.heads[need.head]
            for output in given if need.outputs is None else need.outputs:
                if given[output].dim() == 3:
                    yield ("heads", need.head, output), given[output]
            continue
        assert need.modality is not None
        for name, group in features.of(need.modality).items():
            if need.group in (ALL, name):
                yield (need.modality, name, need.kind), getattr(group, need.kind)


def _features(sections: Mapping[str, Mapping[str, Mapping[str, Tensor]]], local: Features | None) -> Features:
    """Gathered tensors as features, with the views of the local ones."""
    groups: dict[Modality, dict[str, GroupFeatures]] = {"image": {}, "text": {}}
    for modality, found in groups.items():
        for name, kinds in sections[modality].items():
            assert local is not None
            found[name] = GroupFeatures(views=local.of(modality)[name].views, **cast(Any, kinds))
    return Features(image=groups["image"], text=groups["text"], heads=sections["heads"])


def _unsound(features: Features) -> str | None:
    """The first tower or head, as ``Model.parts`` calls it, with an output that is not finite."""
    parts: dict[str, object] = {"image": features.image, "text": features.text}
    parts |= {f"heads.{name}": outputs for name, outputs in features.heads.items()}
    return next((part for part, given in parts.items() if not all(_finite(x) for x in _tensors(given))), None)


def _finite(x: Tensor) -> bool:
    return bool(x.isfinite().all())


def _tensors(features: object) -> Iterator[Tensor]:
    """Every tensor of ``features``, in a fixed order."""
    found: list[Tensor] = []
    map_tensors(features, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return iter(found)


def _join(parts: Sequence[Features]) -> Features:
    """Micro-batches of features to one: every tensor is [V, b, ...] and is joined along its samples."""
    columns = [list(_tensors(part)) for part in parts]
    joined = iter([torch.cat(column, dim=1) for column in zip(*columns, strict=True)])
    return map_tensors(parts[0], lambda _: next(joined))


def refuse_accumulation(assembly: Assembly) -> None:
    """Name the parts that cannot work on micro-batches."""
    model = assembly.model
    mixing = [f"heads.{name} mixes samples" for name in assembly.plan.student.heads if model.head(name).mixes_samples]
    moving = [f"heads.{name} moves buffers" for name in assembly.plan.student.heads if list(model.head(name).buffers())]
    calling = [f"losses.{name} calls a head" for name in model.losses if model.loss(name).calls_heads]
    masked = ["masked patches are read" for group in assembly.plan.student.image.values() if group.masked_tokens]
    reasons = mixing + moving + calling + masked[:1]
    if reasons:
        raise PluginError(
            f"training.micro_batch_size: exact accumulation is impossible here: {'; '.join(reasons)}. Leave it out"
        )
