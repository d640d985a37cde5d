"""FLAIR's losses: text-conditioned, over pairs of an image and a caption, and multi-positive, over global features."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cosmos_ssl.api import ALL, Loss, LossOutput, Need, Spec, StepContext, normalise
from cosmos_ssl.functional import rank, sigmoid_loss

MAX_LOG_SCALE = math.log(100)


class Flair(Loss):
    """Text-conditioned and multi-positive sigmoid loss over K sampled captions an image (FLAIR, arXiv 2412.03561,
    section 3).

    Each is the sum over captions of -log sigmoid(z (scale cosine + bias)), z = 1 for a caption of the image and -1 for
    another's, divided by K and averaged over images. The text-conditioned one compares a caption with the image pooled
    by that caption, the multi-positive one with the image's projected feature. Captions come from all ranks, images are
    the rank's own, and only the first global view of each is read. All text views are captions.
    """

    calls_heads = True

    def __init__(
        self,
        spec: Spec,
        *,
        head: str,
        negative_captions: int | None = None,
        multi_positive_share: float = 0.5,
        init_logit_scale: float = 10.0,
        init_logit_bias: float = -10.0,
    ) -> None:
        """Raises ValueError where the head is not there, or a number makes no sense.

        head: the pooling head, of type ``flair_pool``.
        negative_captions: how many of another image's captions the text-conditioned loss compares an image with; drawn
            each step, evenly over images, and the sum is divided by this number in place of K. None takes all of
            them; the authors' program draws 1, at a K-th of the cost.
        multi_positive_share: weight of the multi-positive loss, from 0 to below 1; the text-conditioned one has the
            rest.
        init_logit_scale: inverse temperature at the start; it is learned, and kept within 1..100. Both losses share it.
        init_logit_bias: bias of the logits at the start; it is learned. Below 0, since nearly all pairs are no match.
        """
        super().__init__()
        if "pooled" not in spec.heads.get(head, {}):
            able = ", ".join(name for name, outputs in spec.heads.items() if "pooled" in outputs) or "none"
            raise ValueError(f"head: no pooling head '{head}'. Heads of that kind: {able}")
        captions = sum(view.views for view in spec.text_views.values())
        if negative_captions is not None and not 1 <= negative_captions <= captions:
            raise ValueError(
                f"negative_captions: {negative_captions} of the {captions} captions of an image cannot be drawn"
            )
        if not 0 <= multi_positive_share < 1:
            raise ValueError(f"multi_positive_share: {multi_positive_share:g} is outside 0..1, 1 excluded")
        if not 1 <= init_logit_scale <= 100:
            raise ValueError(f"init_logit_scale: {init_logit_scale:g} is outside 1..100")
        self.head, self.negatives, self.share, self.seed = head, negative_captions, multi_positive_share, spec.seed
        self.logit_scale = nn.Parameter(torch.tensor(math.log(init_logit_scale)))
        self.logit_bias = nn.Parameter(torch.tensor(float(init_logit_bias)))

    def requires(self) -> list[Need]:
        """The head; tokens, and for the multi-positive loss the feature, of the first global image; captions of all
        ranks.
        """
        needs = [
            Need(head=self.head, outputs=()),
            Need(modality="image", group="global", views=(0,), kind="tokens"),
            Need(modality="text", group=ALL, kind="projected", gathered=True),
        ]
        return [*needs, Need(modality="image", group="global", views=(0,), kind="projected")] if self.share else needs

    def forward(self, ctx: StepContext) -> LossOutput:
        """A term for each loss, with its weight; scale and bias."""
        texts = ctx.gathered["student"].stack("text")  # [K, N, D]
        terms = {"text_conditioned": (1 - self.share) * self._text_conditioned(ctx, texts)}
        if self.share:
            images = ctx.student.stack("image", group="global")  # [1, B, D]
            loss = sigmoid_loss(normalise(images), normalise(texts), self.logit_scale.exp(), self.logit_bias)
            terms["multi_positive"] = self.share * loss  # averaged over its K views of texts: divided by K
        return LossOutput(terms=terms, metrics={"logit_scale": self.logit_scale.exp(), "logit_bias": self.logit_bias})

    def _text_conditioned(self, ctx: StepContext, texts: Tensor) -> Tensor:
        tokens = ctx.student.image["global"].tokens_of((0,))[0]  # [B, P, W]
        captions, samples, _ = texts.shape
        own = rank() * len(tokens) + torch.arange(len(tokens), device=texts.device)
        positives = own[:, None] + samples * torch.arange(
            captions, device=texts.device
        )  # [B, K], rows of texts laid end to end
        asked = None
        if self.negatives not in (None, captions):
            asked = torch.cat([positives, self._draw(own, captions, samples, ctx.progress.step)], dim=1)
            positives = torch.arange(captions, device=texts.device).expand_as(positives)
        scores = ctx.head(self.head, tokens, texts.flatten(0, 1), asked)["score"]
        logits = self.logit_scale.exp() * scores + self.logit_bias
        signs = torch.ones_like(logits).scatter_(1, positives, -1)
        return F.softplus(signs * logits).sum(1).mean() / (self.negatives or captions)

    def _draw(self, own: Tensor, captions: int, samples: int, step: int) -> Tensor:
        """Some captions of every other image, int64 [B, (N - 1) x negatives]: a function of seed, step and image,
        whatever the ranks.
        """
        assert self.negatives is not None
        generator = torch.Generator().manual_seed(hash((self.seed, step)) & 0x7FFF_FFFF_FFFF_FFFF)
        first = torch.randint(captions, (samples,), generator=generator).to(own.device, non_blocking=True)
        others = (own[:, None] + torch.arange(1, samples, device=own.device)) % samples  # [B, N - 1]
        views = (first[others] + own[:, None])[..., None] + torch.arange(self.negatives, device=own.device)
        return (views % captions * samples + others[..., None]).flatten(1)

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the log-scale within 0..ln 100, as OpenCLIP does."""
        self.logit_scale.clamp_(0, MAX_LOG_SCALE)
