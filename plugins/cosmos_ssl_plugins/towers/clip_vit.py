"""The image tower of CLIP: a vision transformer that encodes views of all sizes in one packed pass.

Shape letters: n images, N patches of one image, P rows before them (class token, registers), W width, D shared width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cosmos_ssl.api import (
    Few,
    GroupFeatures,
    GroupPlan,
    ImageGroup,
    Modality,
    Pixels,
    Share,
    Size,
    Spec,
    Strength,
    Tower,
    TowerSpec,
    UserError,
    ViewSpec,
    Whole,
)
from cosmos_ssl.functional import sincos_positions, upload
from cosmos_ssl.models.attention import put_rows, take_rows
from cosmos_ssl.models.transformer import (
    Activation,
    Blocks,
    LayerNorm,
    Layout,
    Recomputed,
    lay_out,
    layer_of,
    pick_views,
)
from cosmos_ssl_plugins.towers.reads import Read

_CLIP = TowerSpec(width=1)


class ClipViT(Tower):
    """CLIP's vision transformer: pre-norm blocks, class token, learned positions (Radford et al. 2021, section 2.4).

    ``width``, ``layers``, ``heads``: size of the transformer; heads are width / 64 unless given.
    ``mlp_ratio``: width inside a block's MLP over the tower's.
    ``image_size``, ``patch_size``: sides of a picture and of a patch in pixels; they set the grid of positions.
    ``pre_norm``: a LayerNorm before the blocks.
    ``registers``: so many free tokens (arXiv 2309.16588).
    ``positions``: ``learned``, or ``sincos``: sines and cosines of row and column, and zeros for the class token, which
    are not trained (MAE, MoCo v3). Views of other sizes interpolate either.
    ``mask_token``: a learned token for hidden patches (masked image modelling).
    ``layer_scale``: start value of a scale on each branch; None is no scale.
    ``drop_path``: rate of the last block, growing linearly from 0 at the first.
    ``drop_path_uniform``: ``drop_path`` is the rate of every block, as in DINOv2.
    ``grad_checkpointing``: compute blocks again in the backward pass instead of keeping what they need; ``alternate``:
    every other one, for half of the memory and half of the work.
    ``patch_dropout``: this share of the patches of each picture is left out of the student in training, drawn anew at
    each step (FLIP, arXiv 2212.00794); where no part reads patches.
    ``activation``: of the MLPs: GELU, its quick form (OpenAI's CLIP, DFN), or that by tanh (SigLIP 2).
    ``norm_eps``: what LayerNorms add to the variance.
    ``patch_bias``: the patch embedding adds a bias, as in timm's models without ``pre_norm``.
    ``pooling``: the class token's feature, or the mean over patches.
    ``norm_after_pool``: of a mean: the last LayerNorm comes after it, as in CLIPA.
    ``mean``, ``std``: by which the channels of pictures are normalised.
    ``resize``: how evaluation makes a picture square: it cuts the middle out, or squashes it.
    ``interpolation``: by which evaluation resizes.

    Raises ValueError for sizes that do not fit.
    """

    modality: ClassVar[Modality] = "image"

    def __init__(
        self,
        spec: Spec,
        *,
        width: Size = 768,
        layers: Few = 12,
        patch_size: Pixels = 16,
        image_size: Pixels = 224,
        heads: Size | None = None,
        mlp_ratio: Strength = 4.0,
        registers: Whole = 0,
        layer_scale: Strength | None = None,
        drop_path: Share = 0.0,
        drop_path_uniform: bool = False,
        mask_token: bool = False,
        pre_norm: bool = True,
        grad_checkpointing: Recomputed = False,
        patch_dropout: Share = 0.0,
        activation: Activation = "gelu",
        norm_eps: Strength = 1e-5,
        patch_bias: bool = False,
        positions: Literal["learned", "sincos"] = "learned",
        pooling: Literal["class", "mean"] = "class",
        norm_after_pool: bool = False,
        mean: tuple[Share, Share, Share] = _CLIP.mean,
        std: tuple[Share, Share, Share] = _CLIP.std,
        resize: Literal["crop", "squash"] = "crop",
        interpolation: Literal["bicubic", "bilinear"] = "bicubic",
    ) -> None:
        super().__init__()
        if patch_dropout >= 1:
            raise ValueError(f"patch_dropout: {patch_dropout:g} is no share below 1")
        self.patch_dropout = patch_dropout
        if image_size < patch_size:
            raise ValueError(f"image_size: {image_size} is smaller than a patch of {patch_size}")
        if positions == "sincos" and width % 4:
            raise ValueError(f"positions: sincos needs a width that is a multiple of 4, not {width}")
        pixels: dict[str, Any] = {"mean": mean, "std": std, "resize": resize, "interpolation": interpolation}
        self.spec = TowerSpec(width=width, image_size=image_size, patch_size=patch_size, **pixels)
        self.kind = {
            "activation": activation,
            "norm_eps": norm_eps,
            "patch_bias": patch_bias,
            "pooling": pooling,
            "norm_after_pool": norm_after_pool,
            **pixels,
        }
        self.mean_pooling, self.norm_after_pool = pooling == "mean", pooling == "mean" and norm_after_pool
        if self.mean_pooling and patch_dropout:
            raise ValueError("patch_dropout: needs pooling class: a mean is taken over all patches")
        kinds = {"tokens": True, "csa": True, "drop": not self.mean_pooling, "masks": mask_token}
        self.capabilities = frozenset(name for name, has in kinds.items() if has)
        self.attention = spec.attention
        self.prefix = 1 + registers
        self.layer_count = layers + 1
        self.grid = image_size // patch_size

        def start(*shape: int) -> nn.Parameter:
            return nn.Parameter(nn.init.normal_(torch.empty(shape), std=width**-0.5))

        self.patch_embed = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=patch_bias)
        self.class_token = start(width)
        if positions == "sincos":
            table = F.pad(sincos_positions(self.grid**2, width), (0, 0, 1, 0))
            self.position_embedding = nn.Parameter(table, requires_grad=False)
        else:
            self.position_embedding = start(1 + self.grid**2, width)
        self.register_tokens = start(registers, width) if registers else None
        self.mask_token = nn.Parameter(torch.zeros(width)) if mask_token else None
        self.norm_pre = LayerNorm(width, norm_eps) if pre_norm else nn.Identity()
        self.blocks = Blocks(
            layers,
            width,
            heads,
            mlp_ratio=mlp_ratio,
            layer_scale=layer_scale,
            drop_path=drop_path,
            drop_path_uniform=drop_path_uniform,
            grad_checkpointing=grad_checkpointing,
            activation=activation,
            norm_eps=norm_eps,
            kernels=spec.kernels,
        )
        self.norm = nn.LayerNorm(width, norm_eps)
        self.projection = start(width, spec.embed_dim)
        for block in self.blocks:  # the rest are the defaults of PyTorch's own multi-head attention
            nn.init.xavier_uniform_(block.attn.qkv.weight)
            nn.init.zeros_(block.attn.qkv.bias)
            nn.init.zeros_(block.attn.proj.bias)

    def forward(self, groups: Mapping[str, ImageGroup], plan: Mapping[str, GroupPlan]) -> dict[str, GroupFeatures]:
        """Encode the views in ``plan``; pixels float [V, B, 3, H, W], cropped to whole patches."""
        parts, reads = [], []
        start = 0
        for name, wanted in plan.items():
            pixels = pick_views(groups[name].pixels, wanted.views)
            masks = groups[name].masks if wanted.hide_masked or wanted.drop_masked or wanted.masked_tokens else None
            masks = None if masks is None else pick_views(masks, wanted.views)
            hidden = upload(pixels.device, masks.flatten(0, 1)) if masks is not None and wanted.hide_masked else [None]
            x = self._embed(pixels.flatten(0, 1), *hidden)
            if self.training and self.patch_dropout:
                x = self._drop_patches(x)
            read = Read(wanted, pixels.shape[1], x.shape[1], self.prefix, start, masks)
            rows = x.flatten(0, 1)
            parts.append(rows if read.kept is None else take_rows(rows, *upload(rows.device, read.kept)))
            reads.append(read)
            start += len(parts[-1])
        if not parts:
            return {}
        packed = parts[0] if len(parts) == 1 else torch.cat(parts)
        layout = self._lay_out(reads, start, packed.device)
        packed = self.blocks(self.norm_pre(packed), layout)
        packed = packed if self.norm_after_pool else self.norm(packed)
        return {name: self._features(packed, layout, read) for name, read in zip(plan, reads, strict=True)}

    def check_inputs(self, views: Mapping[str, ViewSpec]) -> None:
        """Raise ValueError for views that are smaller than a patch."""
        patch = self.spec.patch_size
        for name, view in views.items():
            if view.size is not None and view.size < patch:
                raise ValueError(
                    f"the views '{name}' of augmenters.image are {view.size} pixels wide, less than a patch of {patch}"
                )

    def dense(self, pixels: Tensor, *, csa: bool = False) -> tuple[Tensor, Tensor]:
        """Dense inference: pixels [B, 3, H, W] of any size -> normed tokens [B, N, W] and pooled [B, W], not projected.

        ``csa``: the last block attends by queries and by keys to themselves (SCLIP, Wang et al. 2024).
        """
        x = self._embed(pixels, None)
        lengths = np.full(len(x), x.shape[1])
        layout = lay_out(lengths, np.ones(lengths.sum(), bool), device=x.device, backend=self.attention)
        out = self.blocks(self.norm_pre(x.flatten(0, 1)), layout, csa=csa).view_as(x)
        out = out if self.norm_after_pool else self.norm(out)
        tokens = out[:, self.prefix :]
        return self._late(tokens), self._late(tokens.mean(1)) if self.mean_pooling else out[:, 0]

    def unread(self, plan: Mapping[str, GroupPlan]) -> Sequence[str]:
        """The projection and the mask token, where no group reads them. Raises UserError for patches that are read, and
        may have been left out.
        """
        patches = [name for name, wanted in plan.items() if wanted.tokens or wanted.masked_tokens or wanted.drop_masked]
        if self.patch_dropout and patches:
            raise UserError(
                f"model.image.patch_dropout: patches of the views '{patches[0]}' are read, by a loss or by a head, and "
                "cannot be left out. Set it to 0"
            )
        used = {
            "projection": any(wanted.projected for wanted in plan.values()),
            "mask_token": any(wanted.hide_masked for wanted in plan.values()),
        }
        return tuple(name for name, read in used.items() if not read and getattr(self, name) is not None)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the blocks alone, in place: what surrounds them plans on the host and is quick."""
        self.blocks.compile(*args, **kwargs)

    def layer_of(self, name: str) -> int:
        """The depth of a parameter: 0 embeddings, 1 .. layers blocks, ``layer_count`` what follows them."""
        return layer_of(name, self.layer_count)

    def _embed(self, pixels: Tensor, masks: Tensor | None) -> Tensor:
        """Images [n, 3, H, W] -> rows [n, P + N, W]; the patch convolution as one matrix product."""
        n, _, height, width = pixels.shape
        p = self.spec.patch_size
        rows, columns = height // p, width // p
        patches = pixels[..., : rows * p, : columns * p].reshape(n, 3, rows, p, columns, p)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(n, rows * columns, -1)
        x = F.linear(patches, self.patch_embed.weight.flatten(1), self.patch_embed.bias)
        if masks is not None:
            assert self.mask_token is not None
            x = torch.where(masks[..., None], self.mask_token.to(x.dtype), x)
        positions = self._positions(rows, columns)
        first = [(self.class_token + positions[0]).to(x.dtype).expand(n, 1, -1)]
        if self.register_tokens is not None:
            first.append(self.register_tokens.to(x.dtype).expand(n, -1, -1))
        positions = positions.to(x.dtype)  # float32 would widen all that follows
        return torch.cat([*first, x + positions[1:]], 1)

    def _drop_patches(self, x: Tensor) -> Tensor:
        """Images [n, P + N, W] -> [n, P + K, W]: of each K random patches, in any order, and all that lies before."""
        n, length, width = x.shape
        patches, first = length - self.prefix, torch.arange(self.prefix, device=x.device)
        kept = max(1, round((1 - self.patch_dropout) * patches))
        drawn = torch.rand(n, patches, device=x.device).topk(kept).indices + self.prefix
        rows = torch.cat([first.expand(n, -1), drawn], 1) + length * torch.arange(n, device=x.device)[:, None]
        return take_rows(x.flatten(0, 1), rows.flatten()).view(n, -1, width)

    def _positions(self, rows: int, columns: int) -> Tensor:
        """Positions of a rows x columns grid, [1 + N, W], bicubic.

        Bicubic interpolation is linear and separable, so it is done by two matrix products: unlike
        PyTorch's own, their gradient is deterministic on CUDA.
        """
        table = self.position_embedding
        if (rows, columns) == (self.grid, self.grid):
            return table
        with torch.autocast(table.device.type, enabled=False):
            down, across = (_bicubic(self.grid, size, table) for size in (rows, columns))
            grid = across @ (down @ table[1:].view(self.grid, -1)).view(rows, self.grid, -1)  # [rows, columns, W]
            return torch.cat([table[:1], grid.flatten(0, 1)])

    def _lay_out(self, reads: Sequence[Read], total: int, device: torch.device) -> Layout:
        keep = np.zeros(total, bool)
        for read in reads:
            keep[read.patches.ravel() if self.mean_pooling else read.pooled] = True
            keep[read.tokens] = True
            keep[read.masked] = True
        lengths = np.concatenate([read.lengths for read in reads])
        return lay_out(lengths, keep, device=device, backend=self.attention)

    def _late(self, features: Tensor) -> Tensor:
        """Features behind the last LayerNorm, where it comes after the mean."""
        return self.norm(features) if self.norm_after_pool else features

    def _features(self, out: Tensor, layout: Layout, read: Read) -> GroupFeatures:
        wanted, batch = read.wanted, read.batch
        if self.mean_pooling:
            rows = take_rows(out, layout.rows(read.patches.ravel()))
            pooled = self._late(rows.view(*read.patches.shape, -1).mean(2))
        else:
            pooled = take_rows(out, layout.rows(read.pooled)).view(len(wanted.views), batch, -1)
        tokens = None
        if wanted.tokens:
            tokens = take_rows(out, layout.rows(read.tokens))
            if read.places is not None:
                (places,) = upload(out.device, read.places)
                tokens = put_rows(tokens, places, len(wanted.tokens) * batch * read.count)
            tokens = tokens.view(len(wanted.tokens), batch, -1, out.shape[1])
            tokens = self._late(tokens)
        return GroupFeatures(
            views=wanted.views,
            pooled=pooled,
            projected=pooled @ self.projection if wanted.projected else None,
            tokens=tokens,
            token_views=wanted.tokens,
            masked_tokens=self._late(take_rows(out, layout.rows(read.masked))) if wanted.masked_tokens else None,
        )


@torch.no_grad()
def _bicubic(source: int, target: int, like: Tensor) -> Tensor:
    """The matrix [target, source] of bicubic interpolation by DINO's rule: the scale factor is (target + 0.1) /
    source.
    """
    unit = torch.eye(source, device=like.device, dtype=like.dtype)[None, :, :, None]
    resized = F.interpolate(unit, scale_factor=((target + 0.1) / source, 1.0), mode="bicubic")
    assert resized.shape[2] == target
    return resized[0, :, :, 0].t()
