"""FLAIR's text-conditioned attention pooling, and the score of a picture and a text that goes by it.

Shape letters: B images, P patches of one, W the image tower's width, D shared width, H heads of width d;
T texts, t of them those that one image is asked about.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cosmos_ssl.api import ALL, Features, Head, HeadOutput, Modality, Need, Spec, Views, normalise
from cosmos_ssl.models.attention import attention

CHUNK = 1 << 24
"""Pooled features held at once, in elements."""


class FlairPool(Head):
    """Multi-head attention of a text's feature over an image's patches: what the image shows of that text.

    FLAIR, arXiv 2412.03561, section 3: one query a text, keys and values from the patch tokens and from an empty token
    of zeros, which a text may turn to that finds nothing. LayerNorm on query, key and value, no residual. The patch
    tokens have a map to the shared width of their own. Output ``pooled`` [T, B, D]: every text view over the first
    global view of its own image. A loss asks for other pairs (``respond``), and retrieval scores all of them.
    """

    matches = True

    def __init__(self, spec: Spec, *, num_heads: int = 8) -> None:
        """Raises ValueError where a tower is missing or the width is not a multiple of ``num_heads``.

        num_heads: heads of the attention; 8 as published.
        """
        super().__init__()
        if spec.image is None or spec.text is None:
            raise ValueError("text-conditioned pooling needs both model.image and model.text")
        width = spec.embed_dim
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"num_heads: model.embed_dim ({width}) is not a multiple of {num_heads}")
        self.width, self.num_heads, self.backend, self.chunk = width, num_heads, spec.attention, CHUNK
        self.image_tokens = nn.Linear(spec.image.width, width)
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(width) for _ in range(3))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.qkv.weight)  # over [3D, D], as torch.nn.MultiheadAttention starts
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.proj.bias)

    # ------------------------------------------------------------------ own texts

    def outputs(self) -> Mapping[str, int]:
        """``pooled``, of the shared width."""
        return {"pooled": self.width}

    def requires(self, outputs: Collection[str]) -> list[Need]:
        """Projected features of all texts; tokens of the first global image."""
        if not outputs:
            return []
        return [Need(modality="text", group=ALL), Need(modality="image", group="global", views=(0,), kind="tokens")]

    def forward(self, features: Features, views: Views, outputs: Collection[str]) -> HeadOutput:
        """``pooled`` [T, B, D], not normalised; nothing where nobody reads it."""
        if not outputs:
            return {}
        k, v = self._memory(self.image_tokens(features.image["global"].tokens_of((0,))[0]))
        q = self._queries(features.stack("text").transpose(0, 1))
        return {"pooled": self._pool(q, k, v).transpose(0, 1)}

    # ------------------------------------------------------------------ texts of others

    def respond(self, image_tokens: Tensor, texts: Tensor, asked: Tensor | None = None) -> HeadOutput:
        """``score``: the cosine of a text's feature and of the image pooled by that text.

        Args:
            image_tokens: patch tokens of B images, [B, P, W].
            texts: projected features of T texts, [T, D].
            asked: which texts each image is asked about, int64 [B, t] (default: all of them).

        Returns:
            ``score`` [B, t], or [B, T]. Pooled features live only within a chunk of texts: with more than one chunk
            they are computed again for the gradient, and memory beyond the scores does not grow with T.
        """
        return {"score": self._scores(self.image_tokens(image_tokens), texts, asked)}

    def match_needs(self, modality: Modality) -> list[Need]:
        """An image's tokens, a text's projected feature."""
        return [
            Need(modality=modality, group="global", views=(0,), kind="tokens" if modality == "image" else "projected")
        ]

    def match_input(self, features: Features, modality: Modality) -> Tensor:
        """An image's patches at the shared width [B, P, D]; a text's feature [T, D]."""
        if modality == "image":
            return self.image_tokens(features.image["global"].tokens_of((0,))[0])  # type: ignore[no-any-return]
        return features.stack("text", group="global")[0]

    def match(self, images: Tensor, texts: Tensor) -> Tensor:
        """``score`` of ``respond`` from the patches [B, P, D] and features [T, D] of ``match_input``: [B, T]."""
        return self._scores(images, texts, None)

    # ------------------------------------------------------------------ what these stand on

    def _scores(self, patches: Tensor, texts: Tensor, asked: Tensor | None) -> Tensor:
        k, v = self._memory(patches)
        q, unit = self._queries(texts), normalise(texts)
        step = max(1, self.chunk // (len(patches) * self.width))
        parts: list[tuple[Tensor, Tensor, Tensor | None]]
        if asked is None:
            parts = [(*part, None) for part in zip(q.split(step), unit.split(step), strict=True)]
        else:
            parts = [(q, unit, rows) for rows in asked.split(step, dim=1)]
        score = self._part
        if len(parts) > 1 and torch.is_grad_enabled():
            score = partial(checkpoint, score, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([score(k, v, *part) for part in parts], dim=1)

    def _part(self, k: Tensor, v: Tensor, q: Tensor, unit: Tensor, rows: Tensor | None) -> Tensor:
        """Keys and values [B, P + 1, H, d], queries [T, H, d], unit texts [T, D], rows of them [B, t] -> scores [B, t
        or T].
        """
        if rows is None:
            q = q.expand(len(k), *q.shape)
        else:
            q, unit = q[rows], unit[rows]
        # no matrix product: autocast would take it to half precision
        return (normalise(self._pool(q, k, v)) * unit).sum(-1)

    def _queries(self, texts: Tensor) -> Tensor:
        """[..., D] -> [..., H, d]."""
        return self._heads(F.linear(self.norm_q(texts), self.qkv.weight[: self.width], self.qkv.bias[: self.width]))

    def _memory(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Patches [B, P, D] -> keys and values [B, P + 1, H, d], computed once for all texts; the last is the empty
        token.
        """
        weights, biases = self.qkv.weight[self.width :].chunk(2), self.qkv.bias[self.width :].chunk(2)
        found = []
        for norm, weight, bias in zip((self.norm_k, self.norm_v), weights, biases, strict=True):
            found.append(self._heads(F.pad(F.linear(norm(patches), weight, bias), (0, 0, 0, 1))))
        return found[0], found[1]

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.num_heads, -1)

    def _pool(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries [B, t, H, d] over keys and values [B, P + 1, H, d] -> [B, t, D]."""
        return self.proj(attention(q, k, v, backend=self.backend).flatten(-2))  # type: ignore[no-any-return]
