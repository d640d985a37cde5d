"""COSMOS's cross-attention heads: image views ask the text, text views ask the image."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cosmos_ssl.api import ALL, Features, Head, HeadOutput, Need, Size, Spec, Views, normalise
from cosmos_ssl.models.attention import attention
from cosmos_ssl.models.transformer import narrowed


class CrossAttentionLayer(nn.Module):
    """Multi-head attention of width D from queries to tokens, LayerNorm on both, no residual."""

    def __init__(self, width: int, num_heads: int, backend: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.backend = backend
        self.norm_q = nn.LayerNorm(width)
        self.norm_kv = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.qkv.weight)  # over [3D, D], as torch.nn.MultiheadAttention starts
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.proj.bias)

    def project(self, query: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[V, B, D], [B, N, D] -> q [B, V, H, d], k and v [B, N, H, d]."""
        width = query.shape[-1]
        query, tokens = (x.to(self.qkv.weight.dtype) for x in (query, tokens))
        q_weight, kv_weight = self.qkv.weight.split_with_sizes([width, 2 * width])
        q_bias, kv_bias = self.qkv.bias.split_with_sizes([width, 2 * width])
        q = F.linear(self.norm_q(query).transpose(0, 1), q_weight, q_bias)
        k, v = F.linear(self.norm_kv(tokens), kv_weight, kv_bias).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in (q, k, v))
        return q, k, v

    def forward(self, query: Tensor, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        """[V, B, D], [B, N, D], tokens to look at [B] (None: all) -> [V, B, D].

        All views are queries of one call, so keys and values are computed once a sample.
        """
        q, k, v = self.project(query, tokens)
        out = attention(q, k, v, key_lengths=lengths, backend=self.backend)
        return self.proj(out.flatten(-2)).transpose(0, 1)  # type: ignore[no-any-return]

    def weights(self, query: Tensor, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        """Attention weights averaged over heads: [V, B, N]."""
        q, k, _ = self.project(query, tokens)
        logits = torch.einsum("bvhd,bnhd->bhvn", q, k) * q.shape[-1] ** -0.5
        if lengths is not None:
            hidden = torch.arange(k.shape[1], device=k.device) >= lengths.to(k.device)[:, None]
            logits = logits.masked_fill(hidden[:, None, None], -torch.inf)
        weights: Tensor = logits.softmax(-1).mean(1).transpose(0, 1)
        return weights


class CrossAttention(Head):
    """Cross features of COSMOS (arXiv 2412.01814, section 3): each view's feature plus what it finds in the other
    modality.

    Every image view's projected feature asks the tokens of the first global text, every text view's
    the tokens of the first global image. Outputs ``image`` [V, B, D] and ``text`` [T, B, D], unit length.
    The token maps (tower width to D) live here.
    """

    def __init__(self, spec: Spec, *, num_heads: Size = 8, mask_padding: bool = False) -> None:
        """``mask_padding`` hides the pads of the text from image views; the published method attends to them.

        Raises ValueError where a tower is missing or the width is not a multiple of ``num_heads``.
        """
        super().__init__()
        if spec.image is None or spec.text is None:
            raise ValueError("cross-attention needs both model.image and model.text")
        width = spec.embed_dim
        if width % num_heads:
            raise ValueError(f"num_heads: model.embed_dim ({width}) is not a multiple of {num_heads}")
        self.width = width
        self.mask_padding = mask_padding
        self.image_tokens = nn.Linear(spec.image.width, width)
        self.text_tokens = nn.Linear(spec.text.width, width)
        self.image_asks_text = CrossAttentionLayer(width, num_heads, spec.attention)
        self.text_asks_image = CrossAttentionLayer(width, num_heads, spec.attention)

    def outputs(self) -> Mapping[str, int]:
        """``image`` and ``text``, both of the shared width."""
        return {"image": self.width, "text": self.width}

    def requires(self, outputs: Collection[str]) -> list[Need]:
        """Projected features of all views of a modality; tokens of the first global view of the other."""
        needs = []
        first = Need(modality="image", group="global", views=(0,), kind="tokens", hidden=False)
        if "image" in outputs:
            needs.append(Need(modality="image", group=ALL, kind="projected", hidden=False))
            needs.append(replace(first, modality="text", pads=not self.mask_padding))
        if "text" in outputs:
            needs.append(Need(modality="text", group=ALL, kind="projected", hidden=False))
            needs.append(first)
        return needs

    def unread(self, outputs: Collection[str]) -> list[str]:
        """The asking module of an output that nobody reads, and the map of the tokens that it would ask."""
        patterns = {"image": ["image_asks_text.*", "text_tokens.*"], "text": ["text_asks_image.*", "image_tokens.*"]}
        return [pattern for name, own in patterns.items() if name not in outputs for pattern in own]

    def _image_asks(self, features: Features, views: Views, *, mask: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Image queries [V, B, D], the text's tokens [B, S, D], and its lengths where pads are hidden."""
        tokens = _mapped(self.text_tokens, features.text["global"].tokens_of((0,))[0])
        return features.stack("image"), tokens, views.text["global"].lengths[0] if mask else None

    def _text_asks(self, features: Features) -> tuple[Tensor, Tensor, Tensor | None]:
        """Text queries [T, B, D] and the image's tokens [B, N, D]."""
        return features.stack("text"), _mapped(self.image_tokens, features.image["global"].tokens_of((0,))[0]), None

    def forward(self, features: Features, views: Views, outputs: Collection[str]) -> HeadOutput:
        """Unit cross features of every view."""
        found = {}
        with narrowed(self, views.device):
            if "image" in outputs:
                image, tokens, lengths = self._image_asks(features, views, mask=self.mask_padding)
                found["image"] = normalise(image + self.image_asks_text(image, tokens, lengths))
            if "text" in outputs:
                text, tokens, lengths = self._text_asks(features)
                found["text"] = normalise(text + self.text_asks_image(text, tokens, lengths))
        return found

    def attention_weights(self, features: Features, views: Views, *, mask_padding: bool = True) -> dict[str, Tensor]:
        """Return where each view looks, averaged over heads: ``image`` over words [V, B, S], ``text`` over patches [T,
        B, N].
        """
        return {
            "image": self.image_asks_text.weights(*self._image_asks(features, views, mask=mask_padding)),
            "text": self.text_asks_image.weights(*self._text_asks(features)),
        }


def _mapped(linear: nn.Linear, tokens: Tensor) -> Tensor:
    """Tokens [..., W] to [..., D], in the precision of the weights."""
    return linear(tokens.to(linear.weight.dtype))  # type: ignore[no-any-return]
