"""One update, from a batch of views to moved weights: ``Step`` from the top down, and the stages that it calls.

Beside it: ``forward`` has the stages, ``exchange`` what ranks tell one another, ``accumulate`` micro-batches,
``culprit`` the search for what is not finite.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.profiler import record_function

from cosmos_ssl.api import Features, PluginError, Progress, Views
from cosmos_ssl.config import TrainingConfig
from cosmos_ssl.engine.accumulate import accumulate, refuse_accumulation
from cosmos_ssl.engine.assembly import Assembly
from cosmos_ssl.engine.culprit import find_culprit
from cosmos_ssl.engine.distributed import World
from cosmos_ssl.engine.exchange import GradientMean, RunningStatistics
from cosmos_ssl.engine.forward import Batch, Forward, Result
from cosmos_ssl.engine.state import RunState
from cosmos_ssl.errors import TrainingError, listed
from cosmos_ssl.functional import all_max, is_sharded, world_size
from cosmos_ssl.models.contract import blaming, checked_moves
from cosmos_ssl.models.model import buffers_of
from cosmos_ssl.models.precision import coarse_products

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """What a rank knows and all must learn of at the same step; the largest of each counts."""

    signal: int = 0
    """The signal that asks the run to end."""
    bad_samples: int = 0
    """Samples of this batch that were replaced."""
    unsaved: bool = False
    """Whether a checkpoint could not be written."""
    save: bool = False
    """Whether one is due after this step."""

    @property
    def told(self) -> list[float]:
        """As numbers, in this order."""
        return [self.signal, self.bad_samples, self.unsaved, self.save]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """What all ranks agree on, once a step."""

    finite_loss: bool
    finite_gradient: bool
    loss: float
    """This rank's own, of which they do not agree."""
    news: News

    @property
    def sound(self) -> bool:
        """Whether the update is made."""
        return self.finite_loss and self.finite_gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What a step leaves behind."""

    result: Result
    norm: Tensor
    """Of the gradient before it was clipped, a scalar."""
    told: Agreement
    moved: Mapping[str, float]
    """What the teacher says of its move, such as its momentum; empty where there was none."""


class Step:
    """Makes updates of a run's state, which it shares with whoever saves it."""

    def __init__(self, assembly: Assembly, state: RunState, training: TrainingConfig) -> None:
        """Raises PluginError where ``training.micro_batch_size`` is asked of parts that mix samples."""
        self.assembly = assembly
        self.state = state
        self.training = training
        self.gradients = Gradients(
            assembly,
            precision=state.precision,
            micro_batch_size=training.micro_batch_size,
            device=state.device,
            scaler=state.scaler,
            average_in=torch.bfloat16 if training.average_in == "bf16" else None,
        )

    def __call__(self, batch: Batch, progress: Progress, news: Callable[[], News] = News) -> Update:
        """Make one update of this rank's share of a batch, on the device; leave it out where it would not be finite.

        ``news`` is asked once the device has all that does not hang on it. Raises TrainingError after too many steps in
        a row that were left out.
        """
        self.state.optimizer.set(progress)
        result = self.gradients(batch, progress)
        norm = self.prepare_gradients(progress)
        told = self.agree(result, norm, news)
        moved = self.move(progress) if told.sound else self.skip(told, result, batch, progress)
        if self.state.scaler is not None:
            self.state.scaler.update()
        return Update(result=result, norm=norm, told=told, moved=moved)

    @record_function("clip")
    def prepare_gradients(self, progress: Progress) -> Tensor:
        """Unscale the gradients, drop those of frozen parameters, and clip; the norm that they had."""
        optimizer, scaler = self.state.optimizer, self.state.scaler
        if scaler is not None:
            optimizer.unscale(scaler)
        optimizer.drop_frozen(progress)
        return optimizer.clip()

    @record_function("agree")
    def agree(self, result: Result, norm: Tensor, news: Callable[[], News]) -> Agreement:
        """Tell all ranks whether loss and gradient are finite, and the news: the one rendezvous of a step.

        On CUDA it is also the one wait for the device: what follows, a teacher's move and the hooks of parts, is code
        of the host, which a device cannot leave out. While it computes, ranks talk about the news; they agree on what
        is finite there, and the answer is sent to the host as soon as it is known.
        """
        values = torch.stack([result.loss, norm])
        faults = values - values != 0  # of what is not finite the difference is NaN
        if not faults.is_cuda:
            own = news()
            own_loss = float(values[0])
            loss, gradient, *told = World().most([*faults.tolist(), *own.told])
        else:
            answer = torch.cat([all_max(faults), values[:1]]).to("cpu", non_blocking=True)
            known = torch.cuda.current_stream().record_event()
            told = World().most(news().told)
            known.synchronize()
            loss, gradient, own_loss = answer.tolist()
        signal, bad, unsaved, save = told
        agreed = News(signal=int(signal), bad_samples=int(bad), unsaved=bool(unsaved), save=bool(save))
        return Agreement(finite_loss=not loss, finite_gradient=not gradient, loss=own_loss, news=agreed)

    def move(self, progress: Progress) -> Mapping[str, float]:
        """Move teacher and weights in the order asked for, then run the hooks of the parts."""
        self.state.counters.nonfinite_in_a_row = 0
        first = self.assembly.update_when == "before_optimizer_step"
        moved = self.move_teacher(progress) if first else {}
        with record_function("optimizer"):
            self.state.optimizer.step()
        if not first:
            moved = self.move_teacher(progress)
        for model in self.state.models.values():
            model.after_step()
        return moved

    @record_function("teacher update")
    def move_teacher(self, progress: Progress) -> Mapping[str, float]:
        """Let the teacher follow the student; where ranks share weights each moves its part."""
        with blaming(self.assembly.teacher, "teacher"), self.state.parts:
            return checked_moves(self.assembly.teacher.update(self.assembly.followed, progress))

    def skip(self, told: Agreement, result: Result, batch: Batch, progress: Progress) -> Mapping[str, float]:
        """Leave the update out: count it, name what is not finite, and put back what the step has moved.

        Raises TrainingError after ``training.max_nonfinite_steps`` in a row.
        """
        counters, scaler, limit = self.state.counters, self.state.scaler, self.training.max_nonfinite_steps
        if told.finite_loss and scaler is not None and scaler.get_scale() > 1:
            counters.overflowed_steps += 1  # part of how the scaler finds its scale, no fault
            self.gradients.restore_buffers()
            return {}
        counters.nonfinite_steps += 1
        counters.nonfinite_in_a_row += 1
        what, keys = "the gradient", batch.keys
        if not told.finite_loss:
            size = self.training.micro_batch_size or len(batch)
            what, keys = find_culprit(self.gradients.forward, result, batch, progress, size)
        self.gradients.restore_buffers()
        step = progress.step + 1
        log.info("step %s: samples %s", step, ", ".join(keys), extra={"file_only": True})
        if counters.nonfinite_in_a_row >= limit:
            raise TrainingError(
                f"step {step:,}: {what} is not finite, {limit} steps in a row (training.max_nonfinite_steps). "
                f"Samples of this step: {listed(keys, limit=8)}. Those of the others are in the run's log.txt"
            )
        log.warning(
            "step %s: %s is not finite, so the update is skipped (samples %s)", f"{step:,}", what, listed(keys, limit=8)
        )
        return {}


class Gradients:
    """Forward and backward over this rank's share of a batch; the means over ranks stay in ``.grad``.

    ``micro_batch_size`` bounds the samples that towers and heads encode at once (``accumulate``); ``average_in``:
    what gradients are averaged over ranks in (default: their own precision).
    """

    def __init__(
        self,
        assembly: Assembly,
        *,
        precision: str = "fp32",
        micro_batch_size: int | None = None,
        device: torch.device | None = None,
        scaler: torch.amp.GradScaler | None = None,
        average_in: torch.dtype | None = None,
    ) -> None:
        self.forward = Forward(assembly, precision=precision, device=device)
        self.model = assembly.model
        self.micro_batch_size = micro_batch_size
        self.scaler = scaler
        self._parameters = list(self.model.parameters())
        self._buffers = buffers_of(self.model)
        self._before = [torch.empty_like(buffer) for buffer in self._buffers()]
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        whole = [parameter for parameter in trained if not is_sharded(parameter)]
        self._mean = GradientMean(whole, average_in) if world_size() > 1 and whole else None
        if self._mean is not None and len(whole) < len(trained):
            self._mean.on = False  # once, at the end: on the way there are the collectives of shards
        self._statistics = RunningStatistics(self.model)
        if micro_batch_size is not None:
            refuse_accumulation(assembly)

    def __call__(self, batch: Batch, progress: Progress) -> Result:
        """Run one step's forward and backward on ``batch``, as loaded or finished, on the device."""
        self.begin(progress)
        views = self.forward.augment(batch)
        with coarse_products(self.forward.device, self.forward.dtype):
            teacher = self.forward.teacher(views)
            result = self.backward(views, teacher, progress)
        if self.forward.resting:
            self._fill()
        elif not self.forward.proven:
            self._check_reached()
        self.forward.prove()
        if self._mean is not None:
            with record_function("gradient mean"):
                self._mean.finish()
        self._statistics.share()
        return replace(result, loss=result.loss.detach())

    def begin(self, progress: Progress) -> None:
        """Drop old gradients, remember the buffers, seed the device; watch the parts closely in the first step."""
        for parameter in self._parameters:
            parameter.grad = None
        self.forward.watch()
        if self._before:
            torch._foreach_copy_(self._before, self._buffers())
        self.forward.tell(progress)
        self.forward.seed(progress)

    def backward(self, views: Views, teacher: Features | None, progress: Progress) -> Result:
        """Encode the student, compute the losses and leave gradients in ``.grad``, a micro-batch at a time if asked."""
        size = self.micro_batch_size
        if size is not None and size < len(views):
            if self._mean is not None:
                self._mean.on = False  # gradients add up first, and are averaged once
            return accumulate(self.forward, views, teacher, progress, size, self._backward)
        result = self.forward.losses(views, self.forward.student(views), teacher, progress)
        self._backward(result.loss)
        return result

    @record_function("backward")
    def _backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def _fill(self) -> None:
        """Give zeros to trained parameters that losses at rest alone would reach: they fade as by a weight of 0."""
        for parameter in self._parameters:
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def restore_buffers(self) -> None:
        """Undo what the last step moved in buffers."""
        if self._before:
            torch._foreach_copy_(self._buffers(), self._before)

    def _check_reached(self) -> None:
        """Raise PluginError, at the first step, for trained parameters without a gradient: ranks would wait for it."""
        missed = [name for name, p in self.model.named_parameters() if p.requires_grad and p.grad is None]
        if missed:
            parts = self.model.parts().items()
            owners = [told for prefix, told in parts if any(name.startswith(f"{prefix}.") for name in missed)]
            raise PluginError(
                f"{', '.join(owners)}: no gradient reaches {listed(missed, limit=1)}. Let a loss read what they "
                f"compute, or freeze them: optimizer.rules: {{rest: {{match: '{missed[0]}', frozen: true}}}}"
            )
