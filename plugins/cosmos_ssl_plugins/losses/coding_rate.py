"""SimDINO: unit features follow the teacher's, and their coding rate keeps them from collapsing.

Shape letters: T the teacher's views, S the student's, V global views, B samples, N samples of all ranks, D width, M
masked patches.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from cosmos_ssl.api import Loss, LossOutput, Need, Spec, StepContext, Strength, Temperature, normalise
from cosmos_ssl.functional import all_sum, world_size
from cosmos_ssl_plugins.heads.per_group import MASKED, found, group_needs
from cosmos_ssl_plugins.losses.ibot import masked_mean
from cosmos_ssl_plugins.losses.targets import Scope

OUTPUT = "global" + MASKED


class CodingRate(Loss):
    """Half the squared distance to the teacher's features, less the coding rate R (SimDINO and SimDINOv2, arXiv
    2502.10385, section 3).

    All features have unit length, so half a squared distance is one less the cosine. ``distance`` is its mean over all
    pairs of a student's view with another, global one of the teacher; ``patches``, where masks are drawn, that at
    masked patches, which the teacher sees: a mean over those of a view, then over views. ``rate`` is -gamma R, R = 1/2
    log det(I + D / eps^2 Z^T Z / N) of the features Z [N, D] of a global view; a mean over views.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        head: str | None = None,
        eps: Temperature = 0.5,
        gamma: Strength | None = None,
        features: Literal["student", "mean"] = "student",
        scope: Scope = "all_ranks",
    ) -> None:
        """Raises ValueError for a head without the output ``global``, fewer than two views of a picture.

        head: the head that gives features of each view group, such as a ``projection``; None are the tower's own.
        eps: the precision to which features are coded.
        gamma: weight of the coding rate; None is eps sqrt(N / (D min(D, N))), by which its gradient keeps its size.
        features: Z is the student's features of unit length, or their ``mean`` with the teacher's of the same view, as
            in the authors' program (``expa_type: 1``).
        scope: Z are the samples of ``all_ranks``, or of this ``rank`` alone, still divided by the N of all, as in the
            authors' program (``reduce_cov: 0``). The loss then depends on the number of ranks.
        """
        super().__init__()
        able = [name for name, outputs in spec.heads.items() if "global" in outputs]
        if head is not None and head not in able:
            raise ValueError(
                f"head: no head '{head}' with an output 'global'. Heads that have it: {', '.join(able) or 'none'}"
            )
        if spec.image is None or "global" not in spec.image_views:
            raise ValueError("needs model.image, and views 'global' of augmenters.image")
        own = group_needs(spec)
        self.reads = {
            name: own[name] if head is None else Need(head=head, outputs=(name,))
            for name in (own if head is None else spec.heads[head])
            if name in spec.image_views or name == OUTPUT
        }
        self.views = ["global", *(name for name in self.reads if name not in ("global", OUTPUT))]
        if sum(spec.image_views[name].views for name in self.views) < 2:
            raise ValueError("needs two views of a picture: give augmenters.image a second global view, or local ones")
        width = spec.image.width if head is None else spec.heads[head]["global"]
        self.factor = width / eps**2
        self.gamma = (
            eps * math.sqrt(spec.batch_size / (width * min(width, spec.batch_size))) if gamma is None else gamma
        )
        self.mean, self.scope = features == "mean", scope

    def requires(self) -> list[Need]:
        """All views and masked patches of the student, and the teacher's global ones."""
        shown = [self.reads[name] for name in ("global", OUTPUT) if name in self.reads]
        return [*self.reads.values(), *(replace(need, role="teacher") for need in shown)]

    def forward(self, ctx: StepContext) -> LossOutput:
        """Two terms, or three; the coding rate, and the share of masked patches, as metrics."""
        assert ctx.teacher is not None
        own = [normalise(found(ctx.student, self.reads[name])) for name in self.views]
        shown = normalise(found(ctx.teacher, self.reads["global"]))  # [T, B, D]
        cosines = torch.einsum("tbd,sbd->ts", shown, torch.cat(own)) / shown.shape[1]
        others = 1 - torch.eye(*cosines.shape, device=cosines.device, dtype=cosines.dtype)  # the same view is left out
        distance = ((1 - cosines) * others).sum() / (cosines.numel() - len(cosines))
        expanded = (own[0] + shown) / 2 if self.mean else own[0]
        rate = coding_rate(expanded, self.factor, self.scope).mean()
        terms, metrics = {"distance": distance, "rate": -self.gamma * rate}, {"coding_rate": rate}
        if OUTPUT in self.reads:
            masks = ctx.views.image["global"].masks
            assert masks is not None
            patches = (normalise(found(features, self.reads[OUTPUT])) for features in (ctx.student, ctx.teacher))
            terms["patches"], metrics["masked"] = masked_mean(1 - torch.linalg.vecdot(*patches), masks)
        return LossOutput(terms=terms, metrics=metrics)


def coding_rate(features: Tensor, factor: float, scope: Scope = "all_ranks") -> Tensor:
    """Return 1/2 log det(I + factor Z^T Z / N) of each view [V], N the samples of all ranks.

    Args:
        features: this rank's [V, B, D], float32 at least.
        factor: D / eps^2.
        scope: ``all_ranks``: Z are their samples [N, D]; every rank finds the same, and averaged gradients are those of
            one rank. ``rank``: Z are this rank's.
    """
    gram, ranks = features.transpose(1, 2) @ features, world_size()
    if scope == "all_ranks":  # each rank's loss moves by this rank's share: all of them
        gram = all_sum(gram) + ranks * (gram - gram.detach())
    one = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
    # waits for no device, and gives NaNs where others raise
    lower: Tensor = torch.linalg.cholesky_ex(one + factor / (ranks * features.shape[1]) * gram).L
    return lower.diagonal(dim1=1, dim2=2).log().sum(1)
