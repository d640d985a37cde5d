"""A teacher that follows the student by exponential moving average."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from cosmos_ssl.api import Progress, Share, Spec, Teacher


class Ema(Teacher):
    """Every parameter moves as t <- m t + (1 - m) s (mean teacher, arXiv 1703.01780).

    The momentum m is ``momentum_teacher``, or rises from it by a cosine to ``final_momentum_teacher`` (DINO, arXiv
    2104.14294).
    """

    def __init__(
        self, spec: Spec, *, momentum_teacher: Share = 0.999, final_momentum_teacher: Share | None = None
    ) -> None:
        super().__init__()
        self.start_momentum = momentum_teacher
        self.final_momentum = momentum_teacher if final_momentum_teacher is None else final_momentum_teacher

    def momentum(self, progress: Progress) -> float:
        """The momentum at this step."""
        return (
            self.final_momentum
            - (self.final_momentum - self.start_momentum) * (1 + math.cos(math.pi * progress.fraction)) / 2
        )

    @torch.no_grad()
    def update(self, student: nn.Module, progress: Progress) -> Mapping[str, float]:
        """Move all parameters in one fused pass; buffers are copied."""
        momentum = self.momentum(progress)
        torch._foreach_lerp_(list(self.model.parameters()), list(student.parameters()), 1 - momentum)
        for own, other in zip(self.model.buffers(), student.buffers(), strict=True):
            own.copy_(other)
        return {"momentum": momentum}
