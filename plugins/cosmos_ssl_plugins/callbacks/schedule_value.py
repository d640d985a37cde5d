"""A number of a part that changes over the run."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from cosmos_ssl.api import Callback, CallbackContext, Curve, Progress, Spec, floats_of, set_float


class ScheduleValue(Callback):
    """Floats of the model's parts go from one value to another, by any schedule.

    They are plain attributes of modules, by the names of modules: 'losses.distill.temperature', or the drop path of all
    of timm's blocks, 'image.*.drop_prob'. A model that is loaded later has the values of its config. Under
    ``training.compile`` every value of a tower is compiled anew.

    ``match``: fnmatch pattern over the names.
    ``value``: their value, such as {type: linear, start: 0.0, end: 0.1, over_epochs: 5}.
    """

    def __init__(self, spec: Spec, *, match: str, value: Curve[float]) -> None:
        self.match, self.value = match, value

    def prepare(self, model: nn.Module) -> None:
        """Raise ValueError where no part has such a float."""
        if not floats_of(model, self.match):
            part = ".".join(self.match.split(".")[:2])
            there = [name for name in floats_of(model, "*") if name.startswith(part)] or floats_of(model, "*")
            raise ValueError(f"match: '{self.match}' is no float of a part. There are: {', '.join(there[:8])}")

    def start(self, ctx: CallbackContext) -> None:
        """Set the value of the step before: an evaluation may come first."""
        self._set(ctx.model, replace(ctx.progress, step=max(ctx.progress.step - 1, 0)))

    def before_step(self, ctx: CallbackContext) -> None:
        """Set the value of this step."""
        self._set(ctx.model, ctx.progress)

    def _set(self, model: nn.Module, progress: Progress) -> None:
        for name in floats_of(model, self.match):
            set_float(model, name, self.value.at(progress))
