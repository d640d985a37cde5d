"""KoLeo: spread features by the distance of each to its nearest neighbour."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional as F

from cosmos_ssl.api import Loss, LossOutput, Need, Share, Spec, StepContext, normalise
from cosmos_ssl.functional import rank
from cosmos_ssl_plugins.losses.targets import Scope


class Koleo(Loss):
    """-log of the distance to the nearest other sample, the Kozachenko-Leonenko estimate of the differential entropy.

    Sablayrolles et al., arXiv 1806.03198, section 3, on the student's global image features at unit length; a mean over
    samples, and as in DINOv2 (weight 0.1) a sum over views. Neighbours are sought in the same view.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        kind: Literal["pooled", "projected"] = "pooled",
        eps: Share = 1e-8,
        scope: Scope = "all_ranks",
    ) -> None:
        """Raises ValueError for a batch of one sample, or an ``eps`` that is not above zero.

        kind: features before (``pooled``) or after the tower's projection.
        eps: added to distances, so that two equal features give a finite value.
        scope: neighbours are sought among the samples of ``all_ranks``, or of this ``rank`` alone, as in DINOv2's
            program (loss/koleo_loss.py). The loss then depends on the number of ranks.
        """
        super().__init__()
        if not eps > 0:
            raise ValueError(f"eps: {eps:g} is not above zero")
        if spec.batch_size < 2:
            raise ValueError("needs neighbours: training.batch_size must be at least 2")
        self.kind: Literal["pooled", "projected"] = kind
        self.eps, self.scope = eps, scope

    def requires(self) -> list[Need]:
        """The student's global image features; those of all ranks too if neighbours are sought there."""
        return [Need(modality="image", group="global", kind=self.kind, gathered=self.scope == "all_ranks")]

    def forward(self, ctx: StepContext) -> LossOutput:
        """One term; the mean distance as a metric."""
        own = normalise(ctx.student.stack("image", self.kind, group="global"))  # [V, B, W]
        everyone, first = own, 0
        if self.scope == "all_ranks":
            everyone = normalise(ctx.gathered["student"].stack("image", self.kind, group="global"))  # [V, N, W]
            first = rank() * own.shape[1]
        with torch.no_grad():
            cosines = own @ everyone.transpose(1, 2)
            cosines.diagonal(first, dim1=1, dim2=2).fill_(-2)  # not itself
            nearest = cosines.argmax(-1, keepdim=True).expand_as(own)
        distances = F.pairwise_distance(own, everyone.gather(1, nearest), eps=self.eps)  # [V, B]
        return LossOutput(
            terms={"koleo": -(distances + self.eps).log().mean(1).sum()}, metrics={"distance": distances.mean()}
        )
