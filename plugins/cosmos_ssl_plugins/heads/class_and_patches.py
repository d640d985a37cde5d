"""dino.txt's image feature: class token and patches by two more blocks, side by side.

Shape letters: V views, B samples, N patches, W width of the tower, D shared width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from cosmos_ssl.api import (
    Features,
    Few,
    GroupFeatures,
    Head,
    HeadOutput,
    Kind,
    Modality,
    Need,
    Share,
    Size,
    Spec,
    Strength,
    Views,
    normalise,
)
from cosmos_ssl.models.transformer import Blocks, lay_out


class ClassAndPatches(Head):
    """A picture as its class token beside the mean of its patches, after blocks that a frozen tower lacks (dino.txt,
    arXiv 2412.16334, section 3).

    One output [V, B, D] a view group: pooled feature and patches of the tower go through transformer blocks and a
    LayerNorm, and one linear map takes each half to D / 2. Texts are their projected features; retrieval compares the
    two by the cosine.
    """

    matches = True

    def __init__(
        self,
        spec: Spec,
        *,
        layers: Few = 2,
        heads: Size | None = None,
        layer_scale: Strength | None = 1e-5,
        drop_path: Share = 0.0,
        drop_path_uniform: bool = False,
    ) -> None:
        """Raises ValueError where there is no image tower, or widths do not fit.

        layers: blocks.
        heads: of their attention; width / 64 unless given.
        layer_scale: start value of a scale on each branch; None is no scale.
        drop_path: rate of the last block, growing linearly from 0 at the first.
        drop_path_uniform: ``drop_path`` is the rate of every block, as in the authors' program.
        """
        super().__init__()
        if spec.image is None:
            raise ValueError("this head needs model.image")
        if spec.embed_dim % 2:
            raise ValueError(f"model.embed_dim ({spec.embed_dim}) has no two halves")
        width = spec.image.width
        self.width, self.attention, self.groups = spec.embed_dim, spec.attention, tuple(spec.image_views)
        self.blocks = Blocks(
            layers,
            width,
            heads,
            layer_scale=layer_scale,
            drop_path=drop_path,
            drop_path_uniform=drop_path_uniform,
            kernels=spec.kernels,
        )
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, spec.embed_dim // 2, bias=False)
        nn.init.normal_(self.projection.weight, std=width**-0.5)

    def outputs(self) -> Mapping[str, int]:
        """Every view group, of the shared width."""
        return dict.fromkeys(self.groups, self.width)

    def requires(self, outputs: Collection[str]) -> list[Need]:
        """Class tokens and patches of these groups, none of them hidden."""
        kinds: Sequence[Kind] = ("pooled", "tokens")
        return [Need(modality="image", group=name, kind=kind, hidden=False) for name in outputs for kind in kinds]

    def forward(self, features: Features, views: Views, outputs: Collection[str]) -> HeadOutput:
        """These groups' features, [V, B, D], not normalised."""
        return {name: self._encode(features.image[name]) for name in outputs}

    def _encode(self, group: GroupFeatures) -> Tensor:
        assert group.pooled is not None and group.tokens is not None
        x = torch.cat([group.pooled[:, :, None], group.tokens], 2)  # [V, B, 1 + N, W]
        lengths = np.full(x.shape[0] * x.shape[1], x.shape[2])
        layout = lay_out(lengths, np.ones(lengths.sum(), bool), device=x.device, backend=self.attention)
        x = self.norm(self.blocks(x.flatten(0, 2), layout)).view_as(x)
        halves = torch.stack([x[:, :, 0], x[:, :, 1:].mean(2)], 2)
        return self.projection(halves).flatten(2)  # type: ignore[no-any-return]

    def match_needs(self, modality: Modality) -> list[Need]:
        """An image's class token and patches, a text's projected feature."""
        return self.requires(["global"]) if modality == "image" else [Need(modality="text", group="global")]

    def match_input(self, features: Features, modality: Modality) -> Tensor:
        """Unit vectors [B, D]."""
        found = self._encode(features.image["global"])[0] if modality == "image" else features.stack("text")[0]
        return normalise(found)

    def match(self, images: Tensor, texts: Tensor) -> Tensor:
        """Cosines [B, T]."""
        return images @ texts.T
