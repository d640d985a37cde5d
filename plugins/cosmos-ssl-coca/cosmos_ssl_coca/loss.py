"""CoCa's captioning loss: each token of a caption from those before it and the picture."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cosmos_ssl.api import Loss, LossOutput, Need, Spec, StepContext
from cosmos_ssl.functional import all_sum, upload, world_size

CHUNK = 1 << 25
"""Logits held at once, in elements."""


class Caption(Loss):
    """Cross-entropy of the next token (CoCa, arXiv 2205.01917, equation 3), a mean over the tokens of all ranks.

    A decoder's tokens say the next of their text by one linear map, up to and with the end-of-text token; pads say
    nothing. The first token (the start of the text, with most tokenizers) is given. All global texts are captions.
    """

    def __init__(self, spec: Spec, *, head: str) -> None:
        """Raises ValueError where the head is not there.

        head: the decoder, of type ``coca_decoder``, or another head with an output ``tokens`` [V, B, S, width] of the
            global texts.
        """
        super().__init__()
        if "tokens" not in spec.heads.get(head, {}):
            able = ", ".join(name for name, outputs in spec.heads.items() if "tokens" in outputs) or "none"
            raise ValueError(f"head: no decoder '{head}'. Heads of that kind: {able}")
        self.head, self.chunk = head, CHUNK
        width = spec.heads[head]["tokens"]
        self.vocabulary = nn.Parameter(width**-0.5 * torch.randn(spec.vocab_size, width))

    def requires(self) -> list[Need]:
        """The decoder's tokens, and the ids that they are to say."""
        return [Need(head=self.head, outputs=("tokens",)), Need(modality="text", group="global", kind="views")]

    def forward(self, ctx: StepContext) -> LossOutput:
        """One term; how many tokens a caption has to say as a metric."""
        text, tokens = ctx.views.text["global"], ctx.student.heads[self.head]["tokens"]
        context = text.tokens.shape[-1]
        said = torch.arange(context - 1) < text.lengths[..., None] - 1  # [V, B, S - 1]: another one follows
        places = F.pad(said, (0, 1)).flatten().nonzero()[:, 0]
        rows, count = upload(tokens.device, places, torch.tensor([float(len(places))]))
        x, targets = tokens.flatten(0, 2)[rows], text.tokens.flatten()[rows + 1]
        parts = [part.split(max(1, self.chunk // len(self.vocabulary))) for part in (x, targets)]
        surprise = _surprise
        if len(parts[0]) > 1:
            surprise = partial(checkpoint, _surprise, use_reentrant=False, preserve_rng_state=False)
        vocabulary = self.vocabulary.to(x.dtype)
        sums = [surprise(vocabulary, *part) for part in zip(*parts, strict=True)]
        everyone = all_sum(count)[0] / world_size()  # the engine's mean over ranks is then one over tokens
        return LossOutput(
            terms={"next_token": torch.stack(sums).sum() / everyone.clamp_min(1)},
            metrics={"tokens": count[0] / text.lengths.numel()},
        )


def _surprise(vocabulary: Tensor, x: Tensor, targets: Tensor) -> Tensor:
    """Directions of all ids [C, W], rows [R, W] and the ids to be said [R] -> the sum of -log p, float32 at least."""
    logits = x @ vocabulary.T
    return F.cross_entropy(logits.to(torch.promote_types(x.dtype, torch.float32)), targets, reduction="sum")
