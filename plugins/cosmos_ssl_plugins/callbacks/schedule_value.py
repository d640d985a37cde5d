"""A number of a part that changes over the run."""

from __future__ import annotations

import math
from typing import Literal

from torch import nn

from cosmos_ssl.api import Callback, CallbackContext, Count, Progress, Spec, Whole, floats_of, set_float


class ScheduleValue(Callback):
    """Floats of the model's parts go from one value to another over some steps, and stay there.

    They are plain attributes of modules, by the names of modules: 'losses.distill.temperature', or the drop path of all
    of timm's blocks, 'image.*.drop_prob'. A model that is loaded later has the values of its config. Under
    ``training.compile`` every value of a tower is compiled anew.

    ``value``: fnmatch pattern over the names.
    ``start``: the value before the first of these steps.
    ``end``: the value after the last.
    ``steps``: over how many steps; null: over the whole run.
    ``begin``: the first of them.
    ``shape``: how it goes.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        value: str,
        start: float,
        end: float,
        steps: Count | None = None,
        begin: Whole = 0,
        shape: Literal["linear", "cosine"] = "linear",
    ) -> None:
        self.value, self.first, self.last = value, start, end
        self.steps, self.begin, self.shape = steps, begin, shape

    def prepare(self, model: nn.Module) -> None:
        """Raise ValueError where no part has such a float."""
        if not floats_of(model, self.value):
            part = ".".join(self.value.split(".")[:2])
            there = [name for name in floats_of(model, "*") if name.startswith(part)] or floats_of(model, "*")
            raise ValueError(f"value: '{self.value}' is no float of a part. There are: {', '.join(there[:8])}")

    def at(self, progress: Progress) -> float:
        """The value in a step. (A schedule of its own kind of parts would take the place of these lines.)"""
        share = (progress.step - self.begin) / (self.steps or max(1, progress.total_steps - self.begin))
        share = min(max(share, 0.0), 1.0)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.first + (self.last - self.first) * share

    def start(self, ctx: CallbackContext) -> None:
        """Set the value of the step before: an evaluation may come first."""
        now = ctx.progress
        before = Progress(step=max(now.step - 1, 0), total_steps=now.total_steps, steps_per_epoch=now.steps_per_epoch)
        self._set(ctx.model, before)

    def before_step(self, ctx: CallbackContext) -> None:
        """Set the value of this step."""
        self._set(ctx.model, ctx.progress)

    def _set(self, model: nn.Module, progress: Progress) -> None:
        for name in floats_of(model, self.value):
            set_float(model, name, self.at(progress))
