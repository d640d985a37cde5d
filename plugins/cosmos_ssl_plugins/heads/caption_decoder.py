"""A captioning decoder: how likely each token of a picture's texts is, given the picture and the tokens before it.

Shape letters: V text views, B samples, n = B x V texts, S context length, L tokens of the longest text, N image tokens,
W width, T tokens that are predicted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cosmos_ssl.api import Features, Few, Head, HeadOutput, Need, Share, Size, Spec, Views
from cosmos_ssl.functional import upload
from cosmos_ssl.models.attention import put_rows, take_rows
from cosmos_ssl.models.transformer import Mlp, SelfAttention, narrowed
from cosmos_ssl_plugins.heads.cross_attention import CrossAttentionLayer

CHUNK = 1 << 25
"""Logits held at once, in elements: 128 MB in float32."""


class DecoderBlock(nn.Module):
    """x + self-attention(norm(x)), then x + cross-attention(x, image), then x + mlp(norm(x))."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, backend: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = SelfAttention(width, num_heads)
        self.cross = CrossAttentionLayer(width, num_heads, backend)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, seen: Tensor, image: Tensor) -> Tensor:
        """[n, L, W], bool [n or 1, 1, L, L], [B, N, W] -> [n, L, W]; texts of one sample are neighbours."""
        n, length, _ = x.shape
        projected = self.attn.project(self.norm1(x).flatten(0, 1))
        q, k, v = (y.view(n, length, *y.shape[1:]).transpose(1, 2) for y in projected)
        x = x + self.attn.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))
        asks = x.view(len(image), -1, x.shape[-1]).transpose(0, 1)  # every token of a sample asks its picture
        x = x + self.cross(asks, image, None).transpose(0, 1).reshape(x.shape)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class CaptionDecoder(Head):
    """A transformer decoder with cross-attention to all patches of the first global picture (CapPa, arXiv 2306.07915;
    LocCa, arXiv 2403.19596).

    Output ``nll`` [V, B, S, 1] is the negative log-likelihood of each token of the texts, in nats, and 0 where none is
    predicted: at the first token, which is given (a start token), and at pads. Logits are held for some tokens at once,
    and computed again in the backward pass.

    ``layers``, ``width``, ``num_heads``: size of the decoder; width is the text tower's, heads are width / 64 unless
    given.
    ``mlp_ratio``: width inside a block's MLP over the decoder's.
    ``group``: the view group of the texts.
    ``parallel``: share of the texts whose tokens are all predicted at once, from mask tokens (CapPa, section 3), drawn
    anew at each step; of the student in training.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        layers: Few = 6,
        width: Size | None = None,
        num_heads: Size | None = None,
        mlp_ratio: float = 4.0,
        group: str = "global",
        parallel: Share = 0.0,
    ) -> None:
        """Raises ValueError where pictures or texts are missing, and for sizes that do not fit."""
        super().__init__()
        if spec.image is None or not spec.vocab_size:
            raise ValueError("a caption decoder needs model.image and a tokenizer")
        width = width or (spec.text.width if spec.text is not None else 512)
        num_heads = num_heads or max(1, width // 64)
        if width % num_heads:
            raise ValueError(f"num_heads: {num_heads} heads cannot share a width of {width}")
        if not 1 / width <= mlp_ratio <= 1000:
            raise ValueError(f"mlp_ratio: {mlp_ratio:g} is no ratio of widths")
        self.group, self.parallel = group, parallel
        self.image_tokens = nn.Linear(spec.image.width, width)
        self.token_embedding = nn.Embedding(spec.vocab_size, width)
        self.position_embedding = nn.Parameter(nn.init.normal_(torch.empty(spec.context_length, width), std=0.01))
        self.mask_token = nn.Parameter(torch.zeros(width)) if parallel else None
        self.blocks = nn.ModuleList(DecoderBlock(width, num_heads, mlp_ratio, spec.attention) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.vocabulary = nn.Linear(width, spec.vocab_size, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.vocabulary.weight, std=width**-0.5)

    def outputs(self) -> Mapping[str, int]:
        """``nll``, one number a token."""
        return {"nll": 1}

    def requires(self, outputs: Collection[str]) -> list[Need]:
        """All patches of the first global picture, and the token ids of the texts."""
        return [
            Need(modality="image", group="global", views=(0,), kind="tokens", hidden=False),
            Need(modality="text", group=self.group, kind="views"),
        ]

    def forward(self, features: Features, views: Views, outputs: Collection[str]) -> HeadOutput:
        """``nll``, float32 at least."""
        texts = views.text[self.group]
        (count, batch), context = texts.shape, texts.tokens.shape[2]
        lengths = texts.lengths.t().reshape(-1, 1)  # [n, 1], on the host, samples first
        longest = context if self.parallel else max(2, int(lengths.max()))
        ids = texts.tokens.transpose(0, 1).flatten(0, 1)[:, :longest]
        places = torch.arange(context).expand(len(ids), -1)
        asked = (places >= 1) & (places < lengths)  # [n, S]
        # where they stand among the tokens that are predicted, and in the output
        rows, cells = upload(ids.device, asked[:, 1:longest].flatten().nonzero()[:, 0], asked.flatten().nonzero()[:, 0])
        with narrowed(self, ids.device):
            image = features.image["global"].tokens_of((0,))[0]
            image = self.image_tokens(image.to(self.image_tokens.weight.dtype))
            x = take_rows(self._decode(ids[:, :-1], image).flatten(0, 1), rows)  # [T, W]
            found = token_nll(x, self.vocabulary.weight, ids[:, 1:].flatten()[rows])
        nll = put_rows(found, cells, len(ids) * context)
        return {"nll": nll.view(batch, count, context, 1).transpose(0, 1)}

    def _decode(self, ids: Tensor, image: Tensor) -> Tensor:
        """Token ids [n, L], image tokens [B, N, W] -> what is known at each place of the token that follows, [n, L,
        W].
        """
        x = self.token_embedding(ids)
        seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()[None, None]
        if self.mask_token is not None and self.training:
            drawn = torch.rand(len(ids), device=ids.device) < self.parallel
            x = torch.where(drawn[:, None, None], self.mask_token, x)
            seen = seen | drawn[:, None, None, None]
        x = x + self.position_embedding[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, seen, image)
        return self.norm(x)  # type: ignore[no-any-return]


def token_nll(x: Tensor, weight: Tensor, targets: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """-log softmax(x weight^T) at the targets: [T, W], [K, W], int64 [T] -> [T], float32 at least.

    No more than ``chunk`` logits are held at once, forward or backward.
    """

    def some(x: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(x, weight)
        return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets, reduction="none")

    step = max(1, chunk // len(weight))
    again = partial(checkpoint, some, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([again(*piece, weight) for piece in zip(x.split(step), targets.split(step), strict=True)])
