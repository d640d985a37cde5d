"""timm's plain vision transformers on packed rows: views of all sizes in one pass; the last block answers what is read.

Shape letters: T rows of all images laid end to end, R rows that the last block answers, W width.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cosmos_ssl.models.attention import Packing, packed_attention, take_rows
from cosmos_ssl.models.transformer import Layout, lay_out
from cosmos_ssl_plugins.towers.reads import Read


class PackedBlock(Block):  # type: ignore[misc]  # timm has no types
    """timm's block, which takes rows of images laid end to end too."""

    def forward(self, x: Tensor, packing: Packing | None = None, rows: Tensor | None = None, **options: Any) -> Tensor:
        """[T, W] -> [T, W]; with ``rows`` only these are computed, [R, W], and ``packing`` has them as queries. Without
        ``packing`` as timm does it.
        """
        if packing is None:
            return cast(Tensor, super().forward(x, **options))
        attn = self.attn
        q, k, v = attn.qkv(self.norm1(x)).view(len(x), 3, attn.num_heads, -1).unbind(1)
        if rows is not None:
            x, q = take_rows(x, rows), take_rows(q, rows)
        # norms leave autocast's precision, which kernels want of all three
        q, k = attn.q_norm(q).to(v.dtype), attn.k_norm(k).to(v.dtype)
        attended = packed_attention(q, k, v, packing).flatten(1)
        if hasattr(attn, "norm"):  # not in timm before 1.0.16
            attended = attn.norm(attended)
        x = x + _drop(self.drop_path1, self.ls1(attn.proj_drop(attn.proj(attended))), packing)
        return x + _drop(self.drop_path2, self.ls2(self.mlp(self.norm2(x))), packing)


def _drop(drop_path: nn.Module, branch: Tensor, packing: Packing) -> Tensor:
    """timm's drop path, drawn for each image."""
    rate = getattr(drop_path, "drop_prob", 0.0)
    if not rate or not drop_path.training:
        return branch
    drawn = torch.empty(len(packing.lengths), 1, device=branch.device, dtype=branch.dtype).bernoulli_(1 - rate)
    return branch * drawn.div_(1 - rate)[packing.sequence_of_query]


def pack_blocks(model: Any) -> bool:
    """Let the blocks of a model of timm's take packed rows, where they and their order are its plain ones; whether they
    are.
    """
    if type(model) is not VisionTransformer or not isinstance(model.patch_drop, nn.Identity):
        return False
    if not all(type(block) is Block and _is_plain(block.attn) for block in model.blocks):
        return False
    for block in model.blocks:
        block.__class__ = PackedBlock
    return True


def _is_plain(attn: Any) -> bool:
    return type(attn) is Attention and not attn.attn_drop.p and getattr(attn, "gate", None) is None


def pools_class_token(model: Any) -> bool:
    """Whether pooled features are read from the class token alone."""
    return bool(model.attn_pool is None and model.global_pool == "token")


def lay_out_reads(reads: list[Read], total: int, *, pooled_alone: bool, device: torch.device, backend: str) -> Layout:
    """The layout of packed images: with ``pooled_alone`` the last block answers class tokens and what ``reads`` name
    besides; else all.
    """
    keep = np.full(total, not pooled_alone)
    for read in reads:
        keep[np.concatenate([read.pooled, read.tokens, read.masked])] = True
    lengths = np.concatenate([read.lengths for read in reads])
    return lay_out(lengths, keep, device=device, backend=backend)


def encode_rows(model: Any, x: Tensor, layout: Layout) -> Tensor:
    """The blocks and the last norm: [T, W] -> [R, W]."""
    *first, last = model.blocks
    steps = [*((block, layout.packing, None) for block in first), (last, layout.read_packing, layout.read)]
    for block, packing, rows in steps:
        if model.grad_checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, x, packing, rows, use_reentrant=False)
        else:
            x = block(x, packing, rows)
    return cast(Tensor, model.norm(x))


def embed(model: Any, pixels: Tensor) -> Tensor:
    """Pictures [n, 3, H, W] -> what the first block takes, [n, P + N, W]."""
    return cast(Tensor, model.norm_pre(model._pos_embed(model.patch_embed(pixels))))
