"""CoCa's multimodal decoder: causal text tokens that look at a picture's patches, pooled by learned queries.

Shape letters: V text views, B samples, S tokens of a padded text, N patches, Q queries, W width of the text tower.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from cosmos_ssl.api import Count, Features, Few, Head, HeadOutput, Need, Size, Spec, Strength, Views


class CocaDecoder(Head):
    """The half of CoCa's text decoder that sees the picture (arXiv 2205.01917, section 3.2).

    The half that does not is the text tower, which must be causal. Each layer is pre-norm: causal attention over the
    text, attention to the picture, an MLP with GELU. The picture is its first global view, as ``num_queries`` learned
    queries find it in the patches by one layer of multi-head attention (task-specific attentional pooling), and a
    LayerNorm. Output ``tokens`` [V, B, S, W]: of every global text, normed; those of pads mean nothing.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        layers: Few = 12,
        num_heads: Size = 12,
        num_queries: Count = 256,
        mlp_ratio: Strength = 4.0,
    ) -> None:
        """Raises ValueError where a tower is missing or its width is not a multiple of ``num_heads``.

        layers: of the decoder; CoCa has as many in the text tower.
        num_heads: heads of all attention, that of the pooling too.
        num_queries: what the picture is pooled to.
        mlp_ratio: width inside an MLP over the text tower's.
        """
        super().__init__()
        if spec.image is None or spec.text is None:
            raise ValueError("a multimodal decoder needs both model.image and model.text")
        width = spec.text.width
        if width % num_heads:
            raise ValueError(f"num_heads: model.text.width ({width}) is not a multiple of {num_heads}")
        self.width = width
        self.queries = nn.Parameter(width**-0.5 * torch.randn(num_queries, width))
        self.pool = nn.MultiheadAttention(
            width, num_heads, kdim=spec.image.width, vdim=spec.image.width, batch_first=True
        )
        self.pool_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width,
                num_heads,
                int(mlp_ratio * width),
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def outputs(self) -> Mapping[str, int]:
        """``tokens``, of the text tower's width."""
        return {"tokens": self.width}

    def requires(self, outputs: Collection[str]) -> list[Need]:
        """Causal tokens of the global texts, patches of the first global image."""
        return [
            Need(modality="text", group="global", kind="tokens", causal=True, hidden=False),
            Need(modality="image", group="global", views=(0,), kind="tokens", hidden=False),
        ]

    def forward(self, features: Features, views: Views, outputs: Collection[str]) -> HeadOutput:
        """``tokens`` [V, B, S, W]: each knows its text up to itself, and the picture."""
        patches = features.of("image", hidden=False)["global"].tokens_of((0,))[0]  # [B, N, image width]
        text = features.of("text", hidden=False)["global"].tokens
        assert text is not None
        queries = self.queries.expand(len(patches), -1, -1)
        picture = self.pool_norm(self.pool(queries, patches, patches, need_weights=False)[0])  # [B, Q, W]
        picture = picture.expand(len(text), *picture.shape).flatten(0, 1)
        x = text.flatten(0, 1)  # [V x B, S, W]
        later = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        for layer in self.layers:
            x = layer(x, picture, tgt_mask=later, tgt_is_causal=True)
        return {"tokens": self.norm(x).view(text.shape)}
