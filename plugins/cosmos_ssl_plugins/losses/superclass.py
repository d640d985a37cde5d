"""SuperClass: a picture is classified by the tokens of its texts.

Shape letters: V image views, U texts, B samples of this rank, S tokens of a padded text, C token ids, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cosmos_ssl.api import Loss, LossOutput, Need, Spec, StepContext, TextGroup
from cosmos_ssl.functional import all_sum, upload


class SuperClass(Loss):
    """Softmax cross-entropy with the tokens of the texts as classes (SuperClass, arXiv 2411.03313, section 3).

    A text's target is w_c y_c over its sum. y_c is 1 for tokens that it has, once or often. w_c = log((1 + D) / (1 +
    d_c)) for a token that d_c of D texts have; these are the texts seen so far, on all ranks. What every text has, such
    as its start and its end, so has no weight. A linear classifier reads the global image features before the tower's
    projection; no text tower is read. A mean over pairs of an image view and a text.
    """

    documents: Tensor
    texts: Tensor

    def __init__(self, spec: Spec) -> None:
        """Raises ValueError without an image tower or a tokenizer."""
        super().__init__()
        if spec.image is None or not spec.vocab_size:
            raise ValueError("needs model.image, and a tokenizer whose tokens are the classes")
        self.classifier = nn.Linear(spec.image.width, spec.vocab_size)
        self.register_buffer("documents", torch.zeros(spec.vocab_size, dtype=torch.int64))
        self.register_buffer("texts", torch.zeros((), dtype=torch.int64))

    def requires(self) -> list[Need]:
        """Global image features, and ids of all texts."""
        return [
            Need(modality="image", group="global", kind="pooled", hidden=False),
            Need(modality="text", kind="views"),
        ]

    def forward(self, ctx: StepContext) -> LossOutput:
        """One term; how many tokens of a text have a weight as a metric."""
        images = ctx.student.of("image", hidden=False)["global"].pooled
        assert images is not None
        targets, held = self._targets(torch.cat([self._hot(group) for group in ctx.views.text.values()]))
        linear = self.classifier
        logits = F.linear(images, linear.weight.to(images.dtype), linear.bias.to(images.dtype))  # [V, B, C]
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        return LossOutput(terms={"tokens": -(targets * log_p).sum(-1).mean()}, metrics={"tokens_of_a_text": held})

    def _hot(self, group: TextGroup) -> Tensor:
        """Which tokens each text has, float32 of 0 and 1, [U, B, C]."""
        ids = group.tokens
        (inside,) = upload(ids.device, torch.arange(ids.shape[-1]) < group.lengths[..., None])
        ids = ids.where(inside, ids[..., :1])
        return torch.zeros(*ids.shape[:2], len(self.documents), device=ids.device).scatter_(-1, ids, 1.0)

    @torch.no_grad()
    def _targets(self, hot: Tensor) -> tuple[Tensor, Tensor]:
        """Count the texts; their targets' mean of each sample, [B, C], and how many tokens have weight in a text."""
        texts = self.texts.new_full((1,), hot.shape[0] * hot.shape[1])
        seen = all_sum(torch.cat([hot.sum((0, 1)).long(), texts]))
        self.documents += seen[:-1]
        self.texts += seen[-1]
        weights = ((1 + self.texts) / (1 + self.documents)).log()
        hot = hot * weights
        targets = hot / hot.sum(-1, keepdim=True).clamp_min(torch.finfo(hot.dtype).tiny)
        return targets.mean(0), (hot > 0).sum(-1).float().mean()
