"""A teacher that follows the student by exponential moving average."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from cosmos_ssl.api import Curve, Progress, Share, Spec, Teacher, value_at
from cosmos_ssl.models.model import buffers_of
from cosmos_ssl_plugins.schedules.ways import Cosine


class Ema(Teacher):
    """Every parameter moves as t <- m t + (1 - m) s (mean teacher, arXiv 1703.01780).

    The momentum m is ``momentum_teacher``, or rises from it by a cosine to ``final_momentum_teacher`` (DINO, arXiv
    2104.14294).

    Raises ValueError where both say to what it moves.
    """

    def __init__(
        self, spec: Spec, *, momentum_teacher: Share | Curve[Share] = 0.999, final_momentum_teacher: Share | None = None
    ) -> None:
        super().__init__()
        self._walked: list[tuple[nn.Module, list[Tensor], Callable[[], list[Tensor]]]] = []
        self.scheduled: float | Curve[float] = momentum_teacher
        if final_momentum_teacher is not None:
            if isinstance(momentum_teacher, Curve):
                raise ValueError("final_momentum_teacher: momentum_teacher has an end already. Leave one out")
            rising = Curve[float](type="cosine", start=momentum_teacher, end=final_momentum_teacher)
            self.scheduled = rising.follow(Cosine(spec))

    def momentum(self, progress: Progress) -> float:
        """The momentum at this step."""
        return value_at(self.scheduled, progress)

    @torch.no_grad()
    def update(self, student: nn.Module, progress: Progress) -> Mapping[str, float]:
        """Move all parameters in one fused pass; buffers are copied in another."""
        momentum = self.momentum(progress)
        if [model for model, *_ in self._walked] != [self.model, student]:
            self._walked = [(model, list(model.parameters()), buffers_of(model)) for model in (self.model, student)]
        (_, own, own_buffers), (_, other, other_buffers) = self._walked
        torch._foreach_lerp_(own, other, 1 - momentum)
        if buffers := own_buffers():
            torch._foreach_copy_(buffers, other_buffers())
        return {"momentum": momentum}
