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
        self, spec: Spec, *, image_head: str | None = None, text_group: str = ALL, init_logit_scale: float = 1 / 0.07
    ) -> None:
        """Raises ValueError for a head without an output ``global`` of the shared width, and a scale out of range.

        image_head: a head whose output ``global`` stands in the place of the projected image features.
        text_group: the view group of the texts; all by default.
        init_logit_scale: inverse temperature at the start; it is learned, and kept within 1..100.
        """
        super().__init__()
        if image_head is not None and spec.heads.get(image_head, {}).get("global") != spec.embed_dim:
            able = ", ".join(n for n, o in spec.heads.items() if o.get("global") == spec.embed_dim) or "none"
            raise ValueError(
                f"image_head: no head '{image_head}' with an output 'global' of width {spec.embed_dim}, as the texts "
                f"have. Heads that have it: {able}"
            )
        if not 1 <= init_logit_scale <= 100:
            raise ValueError(f"init_logit_scale: {init_logit_scale:g} is outside 1..100")
        self.image_head, self.text_group = image_head, text_group
        self.logit_scale = nn.Parameter(torch.tensor(math.log(init_logit_scale)))

    def requires(self) -> list[Need]:
        """Global image views of all ranks, or a head's output of them; own text views."""
        images = Need(modality="image", group="global", kind="projected", hidden=False, gathered=True)
        if self.image_head is not None:
            images = Need(head=self.image_head, outputs=("global",), gathered=True)
        return [images, Need(modality="text", group=self.text_group, kind="projected", hidden=False)]

    def forward(self, ctx: StepContext) -> LossOutput:
        """One term, and the scale."""
        gathered = ctx.gathered["student"]
        head = self.image_head
        images = gathered.stack("image", group="global") if head is None else gathered.heads[head]["global"]
        images, texts = normalise(images), normalise(ctx.student.stack("text", group=self.text_group))
        scale = self.logit_scale.exp()
        return LossOutput(terms={"contrastive": info_nce(texts, images, scale)}, metrics={"logit_scale": scale})

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the log-scale within 0..ln 100."""
        self.logit_scale.clamp_(0, MAX_LOG_SCALE)
