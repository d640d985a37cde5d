"""DreamLIP's grouping loss: each sub-caption gathers the patches that it speaks of, and is found by them.

Shape letters: V image views, K sub-captions (text views), B samples, N samples of all ranks, P patches, W width of the
image tower, D shared width.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cosmos_ssl.api import ALL, Loss, LossOutput, Need, Share, Spec, StepContext, normalise
from cosmos_ssl.functional import info_nce

MAX_LOG_SCALE = math.log(100)
TINY = 1e-6


class SubcaptionGrouping(Loss):
    """InfoNCE in both directions between sub-captions and the groups of patches that they gather in their own picture
    (DreamLIP, arXiv 2403.17007, section 3).

    A group is a weighted mean of patches. Weights are the cosines of sub-caption and patch, scaled to 0..1 over the
    patches, without those below a threshold, and divided by their sum (SPARC, arXiv 2401.09865). Global
    image views alone are read; all texts are sub-captions. Patches have a map to the shared width of their own.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        threshold: Share | None = None,
        init_logit_scale: float = 1 / 0.07,
        negatives: Literal["image", "batch"] = "image",
    ) -> None:
        """Raises ValueError for a single text a picture, and for a scale out of range.

        threshold: scaled cosines below it count as 0; None is one over the number of patches, as in SPARC.
        init_logit_scale: inverse temperature at the start; it is learned, and kept within 1..100.
        negatives: the other sub-captions and groups of the same ``image``, or all others of the ``batch`` of all ranks,
            as in the authors' program (open_clip/loss.py).
        """
        super().__init__()
        texts = sum(view.views for view in spec.text_views.values())
        if spec.image is None or texts < 2:
            raise ValueError(f"sub-captions of a picture are told apart, and there are {texts} (augmenters.text)")
        if not 1 <= init_logit_scale <= 100:
            raise ValueError(f"init_logit_scale: {init_logit_scale:g} is outside 1..100")
        self.threshold, self.across = threshold, negatives == "batch"
        self.patches = nn.Linear(spec.image.width, spec.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(init_logit_scale)))

    def requires(self) -> list[Need]:
        """Patches of the global pictures, all texts."""
        return [
            Need(modality="image", group="global", kind="tokens", hidden=False),
            Need(modality="text", group=ALL, kind="projected", hidden=False, gathered=self.across),
        ]

    def forward(self, ctx: StepContext) -> LossOutput:
        """One term, and the scale."""
        tokens = ctx.student.image["global"].tokens
        assert tokens is not None
        patches = normalise(F.linear(tokens.to(self.patches.weight.dtype), self.patches.weight))  # [V, B, P, D]
        texts = normalise(ctx.student.stack("text")).transpose(0, 1)  # [B, K, D]
        groups = normalise(self._weights(texts @ patches.mT) @ patches)  # [V, B, K, D]
        scale = self.logit_scale.exp()
        if self.across:
            everyone = normalise(ctx.gathered["student"].stack("text")).transpose(0, 1)  # [N, K, D]
            loss = info_nce(groups.flatten(1, 2), everyone.flatten(0, 1)[None], scale)
        else:
            logits = scale * groups @ texts.mT  # [V, B, K, K]
            found = logits.log_softmax(-1) + logits.log_softmax(-2)
            loss = -found.diagonal(dim1=-2, dim2=-1).mean() / 2
        return LossOutput(terms={"grouping": loss}, metrics={"logit_scale": scale})

    def _weights(self, cosines: Tensor) -> Tensor:
        """Shares of patches in the group of each sub-caption, from their cosines: [..., P] -> [..., P]."""
        least, most = cosines.aminmax(dim=-1, keepdim=True)
        scaled = (cosines - least) / (most - least).clamp_min(TINY)
        threshold = 1 / cosines.shape[-1] if self.threshold is None else self.threshold
        kept = scaled.masked_fill(scaled < threshold, 0)
        return kept / kept.sum(-1, keepdim=True).clamp_min(TINY)

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the log-scale within 0..ln 100."""
        self.logit_scale.clamp_(0, MAX_LOG_SCALE)
