"""SigLIP's pairwise sigmoid loss over all pairs of global image views and text views."""

from __future__ import annotations

import math

import torch
from torch import nn

from cosmos_ssl.api import ALL, Loss, LossOutput, Need, Spec, StepContext, normalise
from cosmos_ssl.functional import sigmoid_loss


class SigLip(Loss):
    """Sigmoid loss of every image with every text of the global batch (SigLIP, arXiv 2303.15343), averaged over view
    pairs.

    Local image crops are left out, as in the loss ``clip``.
    """

    def __init__(self, spec: Spec, *, init_logit_scale: float = 10.0, init_logit_bias: float = -10.0) -> None:
        """Both are learned, and neither is bounded (section 3.2).

        init_logit_scale: inverse temperature at the start; its logarithm is the parameter.
        init_logit_bias: bias of the logits at the start; below 0, since nearly all pairs are no match.
        """
        super().__init__()
        if not 1e-3 <= init_logit_scale <= 1e3:
            raise ValueError(f"init_logit_scale: {init_logit_scale:g} is outside 0.001..1000")
        if not -1e3 <= init_logit_bias <= 1e3:
            raise ValueError(f"init_logit_bias: {init_logit_bias:g} is outside -1000..1000")
        self.logit_scale = nn.Parameter(torch.tensor(math.log(init_logit_scale)))
        self.logit_bias = nn.Parameter(torch.tensor(float(init_logit_bias)))

    def requires(self) -> list[Need]:
        """Global image views of all ranks, own text views."""
        return [
            Need(modality="image", group="global", kind="projected", hidden=False, gathered=True),
            Need(modality="text", group=ALL, kind="projected", hidden=False),
        ]

    def forward(self, ctx: StepContext) -> LossOutput:
        """One term, the scale and the bias."""
        images = normalise(ctx.gathered["student"].stack("image", group="global"))
        texts = normalise(ctx.student.stack("text"))
        scale = self.logit_scale.exp()
        loss = sigmoid_loss(texts, images, scale, self.logit_bias)
        return LossOutput(terms={"contrastive": loss}, metrics={"logit_scale": scale, "logit_bias": self.logit_bias})
