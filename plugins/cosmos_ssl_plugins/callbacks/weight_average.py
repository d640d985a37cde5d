"""The average of the student's weights over steps, beside any teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cosmos_ssl.api import Callback, CallbackContext, Count, Share, Spec, Whole
from cosmos_ssl.functional import laid_out, local


class WeightAverage(Callback):
    """An average of all parameters: exponential (EMA, arXiv 1703.01780) or of equal weights (SWA, arXiv 1803.05407).

    It lies in every checkpoint as ``NAME.safetensors`` by the callback's name: ``cosmos_ssl.load(run, "NAME")`` and
    ``--which NAME`` of all commands take it. Buffers are the student's.

    ``decay``: share of the average that a step leaves; null: all steps weigh the same.
    ``begin``: steps before the first that counts.
    ``every_steps``: how many steps lie between two that count.
    ``evaluate``: whether the run's evaluators work on it too: ``EVALUATOR/NAME/METRIC``.
    """

    watches = True

    def __init__(
        self,
        spec: Spec,
        *,
        decay: Share | None = 0.999,
        begin: Whole = 0,
        every_steps: Count = 1,
        evaluate: bool = False,
    ) -> None:
        self.decay, self.begin, self.every_steps, self.evaluate = decay, begin, every_steps, evaluate
        self.count = 0
        self.average: dict[str, Tensor] = {}
        self._walked: tuple[list[Tensor], list[Tensor]] | None = None

    def start(self, ctx: CallbackContext) -> None:
        """Put what was loaded where the model is."""
        if self.count:
            own = ctx.model.state_dict()
            self.average = {name: laid_out(value, own[name]) for name, value in self.average.items()}
            self._walk(ctx.model)

    def _walk(self, model: nn.Module) -> None:
        trained = dict(model.named_parameters())
        self._walked = [self.average[name] for name in trained], list(trained.values())

    @torch.no_grad()
    def after_step(self, ctx: CallbackContext) -> None:
        """Take in this step's weights, where they count."""
        done = ctx.progress.step + 1 - self.begin
        if done < 1 or done % self.every_steps:
            return
        self.count += 1
        if self._walked is None:
            self.average = {name: value.detach().clone() for name, value in ctx.model.state_dict().items()}
            self._walk(ctx.model)
            return
        own, theirs = ([local(x) for x in each] for each in self._walked)
        torch._foreach_lerp_(own, theirs, 1 / self.count if self.decay is None else 1 - self.decay)
        for name, buffer in ctx.model.named_buffers():
            if name in self.average:
                self.average[name].copy_(buffer)

    def evaluated(self) -> Mapping[str, Tensor]:
        """The average, once there is one."""
        return self.average if self.evaluate else {}

    def state_dict(self) -> Mapping[str, Any]:
        """The average by the model's names, once there is one."""
        return {"count": self.count, **self.average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it over."""
        self.count = state["count"]
        self.average = {name: value for name, value in state.items() if isinstance(value, Tensor)}
