"""A narrow transformer that says what hidden patches hold: I-JEPA's predictor, MAE's decoder.

Shape letters: V views, B samples, N patches of a view on a square grid, K target blocks, P width of the transformer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from cosmos_ssl.api import Features, Few, Head, HeadOutput, Need, Size, Spec, Views
from cosmos_ssl.functional import sincos_positions, upload
from cosmos_ssl_masked.masks import BlockViews, target_masks


class PatchPredictor(Head):
    """Patches that the student saw, and mask tokens in the places to predict, through a transformer.

    Each is told its place by sines and cosines; the tower's pooled feature goes before them, so that it is trained.
    Target blocks of a view of ``multi_block`` are predicted apart, each from the context alone (I-JEPA, arXiv
    2301.08243, section 3); of other views the places are all that is hidden (MAE, arXiv 2111.06377, section 3).

    Outputs, with K blocks of V views: ``tokens`` [K V, B, N, width], which mean something in places to predict alone,
    and ``targets`` [K V, B, N, 1], 1 in those places and 0 elsewhere; block k of view v is row k V + v.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        predicts: Literal["features", "pixels"] = "features",
        width: Size = 384,
        layers: Few = 12,
        num_heads: Size = 12,
    ) -> None:
        """Raises ValueError without an image tower, or for a width that does not fit.

        predicts: what is said of a patch: features of the image tower's width, or the pixels of its three channels.
        width: of the transformer.
        layers: of the transformer.
        num_heads: heads of its attention.
        """
        super().__init__()
        if spec.image is None or not spec.image.patch_size:
            raise ValueError("a predictor of patches needs model.image, a tower with patches")
        if width % 4 or width % num_heads:
            raise ValueError(f"width: {width} is not a multiple of 4 and of num_heads ({num_heads})")
        views = spec.image_views.get("global")
        self.blocks = views.blocks if isinstance(views, BlockViews) else 0
        self.output = spec.image.width if predicts == "features" else 3 * spec.image.patch_size**2
        self.embed = nn.Linear(spec.image.width, width)
        self.mask_token = nn.Parameter(nn.init.normal_(torch.empty(width), std=0.02))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, num_heads, 4 * width, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width, 1e-6)
        self.predict = nn.Linear(width, self.output)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def outputs(self) -> Mapping[str, int]:
        """``tokens`` and ``targets``."""
        return {"tokens": self.output, "targets": 1}

    def requires(self, outputs: Collection[str]) -> list[Need]:
        """The patches that are seen, and the views for their masks and target blocks."""
        views = Need(modality="image", group="global", kind="views")
        seen = Need(modality="image", group="global", kind="tokens", hidden="drop")
        return [views, seen] if "tokens" in outputs else [views]

    def forward(self, features: Features, views: Views, outputs: Collection[str]) -> HeadOutput:
        """Both outputs, or the one that is asked for."""
        group = views.image["global"]
        masks, wanted = group.masks, target_masks(group, self.blocks)
        device = group.pixels.device
        targets, read = upload(device, wanted, wanted | ~masks)  # type: ignore[operator]
        found = {"targets": targets.flatten(0, 1)[..., None].float()}
        if "tokens" in outputs:
            seen = features.of("image", hidden="drop")["global"]
            assert seen.tokens is not None and seen.pooled is not None
            x = self.embed(seen.tokens)  # [V, B, N, P]
            x = torch.where(targets[..., None], self.mask_token.to(x.dtype), x)  # [K, V, B, N, P]
            x = x + sincos_positions(x.shape[-2], x.shape[-1], device).to(x.dtype)
            x = torch.cat([self.embed(seen.pooled)[..., None, :].expand(*x.shape[:3], 1, -1), x], 3).flatten(0, 2)
            unread = None if not self.blocks else F.pad(~read, (1, 0)).flatten(0, 2)  # neither context nor this block
            for layer in self.layers:
                x = layer(x, src_key_padding_mask=unread)
            found["tokens"] = self.predict(self.norm(x[:, 1:])).view(-1, *seen.tokens.shape[1:3], self.output)
        return {name: found[name] for name in outputs}

    def unread(self, outputs: Collection[str]) -> list[str]:
        """Everything where nobody reads ``tokens``."""
        return [] if "tokens" in outputs else ["*"]
