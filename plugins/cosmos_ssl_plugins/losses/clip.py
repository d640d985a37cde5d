"""CLIP's contrastive loss over all pairs of global image views and text views."""

from __future__ import annotations

import math

import torch
from torch import nn

from cosmos_ssl.api import ALL, Loss, LossOutput, Need, Spec, StepContext, normalise
from cosmos_ssl.functional import info_nce

MAX_LOG_SCALE = math.log(100)


class Clip(Loss):
    """Symmetric InfoNCE of image and text features (CLIP, arXiv 2103.00020), averaged over view pairs.

    Local image crops are left out: with them the model overfits (COSMOS, arXiv 2412.01814).
    """

    def __init__(
        self, spec: Spec, *, head: str | None = None, text_group: str = ALL, init_logit_scale: float = 1 / 0.07
    ) -> None:
        """Raises ValueError for a scale, or a head, that does not fit.

        head: a head whose output ``global`` is compared with texts, in the place of the projected image feature.
        text_group: the view group of the texts; all by default.
        init_logit_scale: inverse temperature at the start; it is learned, and kept within 1..100.
        """
        super().__init__()
        able = [name for name, outputs in spec.heads.items() if outputs.get("global") == spec.embed_dim]
        if head is not None and head not in able:
            raise ValueError(
                f"head: no head '{head}' with an output 'global' of model.embed_dim ({spec.embed_dim}). Heads that "
                f"have it: {', '.join(able) or 'none'}"
            )
        if not 1 <= init_logit_scale <= 100:
            raise ValueError(f"init_logit_scale: {init_logit_scale:g} is outside 1..100")
        self.head, self.text_group = head, text_group
        self.logit_scale = nn.Parameter(torch.tensor(math.log(init_logit_scale)))

    def requires(self) -> list[Need]:
        """Global image views of all ranks, own text views."""
        images = Need(modality="image", group="global", kind="projected", hidden=False, gathered=True)
        return [
            images if self.head is None else Need(head=self.head, outputs=("global",), gathered=True),
            Need(modality="text", group=self.text_group, kind="projected", hidden=False),
        ]

    def forward(self, ctx: StepContext) -> LossOutput:
        """One term, and the scale."""
        everyone = ctx.gathered["student"]
        images = everyone.stack("image", group="global") if self.head is None else everyone.heads[self.head]["global"]
        texts = normalise(ctx.student.stack("text", group=self.text_group))
        scale = self.logit_scale.exp()
        return LossOutput(
            terms={"contrastive": info_nce(texts, normalise(images), scale)}, metrics={"logit_scale": scale}
        )

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the log-scale within 0..ln 100."""
        self.logit_scale.clamp_(0, MAX_LOG_SCALE)
