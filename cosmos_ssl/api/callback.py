"""For authors of callbacks: what is done beside the steps of a run.

A callback in full::

    from collections.abc import Mapping
    from typing import Any

    import torch
    from cosmos_ssl.api import Callback, CallbackContext, Spec, Strength


    class WeightNoise(Callback):
        '''Noise on every weight after each step, which fades over the run.

        ``scale``: its standard deviation at the start.
        '''

        def __init__(self, spec: Spec, *, scale: Strength = 1e-4) -> None:
            self.scale = scale
            self.steps = 0

        @torch.no_grad()
        def after_step(self, ctx: CallbackContext) -> None:
            self.steps += 1
            for parameter in ctx.model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=self.scale * (1 - ctx.progress.fraction))

        def state_dict(self) -> Mapping[str, Any]:
            return {"steps": self.steps}

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            self.steps = state["steps"]

A config then says ``callbacks: {noise: {type: weight_noise, scale: 1e-5}}``; where ``type`` is not given, the name
stands for it. Options and ``spec``: ``cosmos_ssl.api.part``.

When, on all ranks, in the order of the config: ``prepare`` before training and in the check, with the model on the meta
device; ``start`` once, when the run stands where it begins or goes on; ``before_step`` and ``after_step`` around each
update (the latter where it was not left out as not finite), with the progress of the step under way; ``evaluated``
before each evaluation; ``at_epoch`` after the evaluations of an epoch's end and of the run's; ``at_checkpoint`` before
a checkpoint is taken, both with the number of steps done.

What may be changed: values of parameters and buffers of ``ctx.model``, in place and without gradients, and plain
attributes of its modules (``set_float``). Not: names, shapes, ``requires_grad``, the optimiser, the teacher. A callback
that changes nothing of what is computed says ``watches = True``: a run goes on though it was added, changed or removed.
Any other is part of what a run is.

What resume demands: what a callback remembers is in ``state_dict``, by plain values of JSON and by tensors; a run that
goes on from a checkpoint has the state of that step. Plain attributes of modules are in no checkpoint: set them by
``ctx.progress`` alone, in ``start`` too. Checkpoints are taken before the evaluations of their step; ``at_epoch`` comes
again, with the same numbers, where a run goes on from one. Tensors lie in the checkpoint as ``NAME.safetensors``, and
where they are a whole model's, ``cosmos_ssl.load(run, which=NAME)`` and ``--which NAME`` take them; those whose names
begin with ``own.`` (``KEPT``) are the callback's alone.

What ranks demand: each rank does the same. Where they share weights (``training.parallel``) parameters of towers are
``DTensor``s: ``cosmos_ssl.functional`` has ``local``, ``whole`` and ``laid_out`` for them. Random numbers come from
torch's generators, which are seeded before each hook by seed and step, alike on all ranks; ``ctx.metrics`` are the
same numbers on all. A checksum of model and states over ranks is taken at checkpoints: parameters that differ end the
run, states are warned of. ``cosmos_ssl.testing.check_callback`` tries all this but the ranks.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from torch import Tensor, nn

from cosmos_ssl.api.part import ParameterRule, Part, Progress
from cosmos_ssl.api.writer import Writer

KEPT = "own."
"""How names of tensors in a callback's state begin that are no part of a model."""


def _not_asked(*_: str) -> None:
    return


@dataclass(frozen=True, slots=True, kw_only=True)
class CallbackContext:
    """What a callback sees of the run."""

    model: nn.Module
    """The student: names as in checkpoints, ``image.*``, ``text.*``, ``heads.NAME.*``, ``losses.NAME.*``."""
    teacher: nn.Module | None
    progress: Progress
    writers: Writer
    """All writers of the run as one; on ranks but the first they write nothing."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """At an epoch's end: the last of each number that was reported since the one before, of logged steps
    (``loss/clip``) and evaluations (``retrieval/student/...``)."""
    stop: Callable[[str], None] = _not_asked
    """At an epoch's end: ask for the run to end here as a finished one, for this reason. All ranks ask alike."""
    keep: Callable[[], None] = _not_asked
    """At an epoch's end: ask for a checkpoint of this step to be kept as ``RUN/checkpoints/NAME``, by the callback's
    name, in the place of the one before."""


class Callback(Part, ABC):
    """Is called beside the steps of a run. Every hook does nothing unless it is defined."""

    watches: ClassVar[bool] = False
    """Whether it changes nothing of what is computed."""

    def prepare(self, model: nn.Module) -> None:
        """Look for what the options name in the model. Raises ValueError, which may begin with "OPTION: "."""
        return

    def parameter_rules(self) -> Sequence[ParameterRule]:
        """Return what the optimiser should know of parameters, by full names; these come after the config's own."""
        return ()

    def start(self, ctx: CallbackContext) -> None:
        """Begin, or go on: ``load_state_dict`` was called before where there is a state."""
        return

    def before_step(self, ctx: CallbackContext) -> None:
        """Act before the step ``ctx.progress.step``, counted from 0."""
        return

    def after_step(self, ctx: CallbackContext) -> None:
        """Act after weights and teacher have moved."""
        return

    def at_epoch(self, ctx: CallbackContext) -> None:
        """Act after the evaluations of an epoch's end, or of the run's."""
        return

    def at_checkpoint(self, ctx: CallbackContext) -> None:
        """Act before a checkpoint is taken that all ranks take together; change the own state at most."""
        return

    def evaluated(self) -> Mapping[str, Tensor]:
        """Return weights, by the model's names and where it is, on which evaluations are made as well as on the student
        and the teacher: their numbers are ``EVALUATOR/NAME/METRIC``, by the callback's name."""
        return {}

    def state_dict(self) -> Mapping[str, Any]:
        """Return what goes into a checkpoint: tensors, and values that JSON can hold."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave; tensors are in host memory."""
        return


def floats_of(model: nn.Module, match: str) -> list[str]:
    """The names of plain floats within a model that an fnmatch pattern takes in: ``losses.distill.temperature``."""
    names = (
        f"{path}.{name}".removeprefix(".")
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if type(value) is float
    )
    return [name for name in names if fnmatchcase(name, match)]


def set_float(model: nn.Module, name: str, value: float) -> None:
    """Set one of ``floats_of`` a model."""
    path, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(path), attribute, value)
