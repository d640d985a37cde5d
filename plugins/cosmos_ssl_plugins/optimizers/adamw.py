"""AdamW, in one fused pass."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field

from cosmos_ssl.api import Optimizer, Spec

Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamW(Optimizer):
    """Adam with weight decay apart from the gradient (arXiv 1711.05101); PyTorch's, fused on CPU and CUDA.

    ``beta1``: how much of the gradient's running mean stays.
    ``beta2``: how much of its square's stays.
    ``eps``: added to the root of the square's mean.
    """

    state = ("step", "exp_avg", "exp_avg_sq")

    def __init__(
        self,
        spec: Spec,
        *,
        beta1: Beta = 0.9,
        beta2: Beta = 0.98,
        eps: Annotated[float, Field(ge=1e-30, le=1)] = 1e-8,
    ) -> None:
        self.betas, self.eps = (beta1, beta2), eps

    def make(self, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
        """``torch.optim.AdamW``."""
        fused = device.type in ("cpu", "cuda") or None
        return torch.optim.AdamW(groups, lr=groups[0]["lr"], betas=self.betas, eps=self.eps, fused=fused)
