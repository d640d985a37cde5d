"""The towers as plain modules, one batch in and unit vectors out, that a tracer can follow.

Our own towers pack sequences of all lengths and plan on the host; here the same weights are run densely, by PyTorch's
own operations. A tower of another package is called as it is.

Shape letters: B pictures or texts, S context length, N patches, W tower width, D shared width, H heads.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cosmos_ssl.api import GroupPlan, ImageGroup, Modality, TextGroup, UserError
from cosmos_ssl.models.contract import is_built_in
from cosmos_ssl.models.encoder import ModelEncoder
from cosmos_ssl.models.transformer import project

INPUTS: dict[Modality, str] = {"image": "pixels", "text": "tokens"}
"""The name of each program's one input."""
_GROUP = "global"


def plain_tower(encoder: ModelEncoder, modality: Modality) -> nn.Module:
    """One tower as a module of one tensor, float pixels [B, 3, H, W] or int64 tokens [B, S], to unit vectors [B, D]."""
    return _Pictures(encoder) if modality == "image" else _Texts(encoder)


def on_host(encoder: ModelEncoder) -> ModelEncoder:
    """A copy in float32 and host memory, in evaluation mode, that shares nothing with the model."""
    model = copy.deepcopy(encoder.model).cpu().float().requires_grad_(False).eval()
    return ModelEncoder(model, encoder.spec, encoder.tokenizer)


class _Pictures(nn.Module):
    def __init__(self, encoder: ModelEncoder) -> None:
        super().__init__()
        self.tower = cast(Any, encoder.model.image)
        self.plain = is_built_in(self.tower, "towers", "clip_vit")

    def forward(self, pixels: Tensor) -> Tensor:
        features = _vit(self.tower, pixels) if self.plain else _called(self.tower, pixels)
        return F.normalize(features, dim=-1)


class _Texts(nn.Module):
    def __init__(self, encoder: ModelEncoder) -> None:
        super().__init__()
        self.tower, self.lengths = cast(Any, encoder.model.text), encoder.lengths
        self.kind = next((k for k in ("clip_text", "huggingface") if is_built_in(self.tower, "towers", k)), None)
        ids = 0 if encoder.tokenizer is None else encoder.tokenizer.vocab_size
        self.last = rows - 1 if 0 < (rows := self.tower.spec.vocab_size) < ids else None

    def forward(self, tokens: Tensor) -> Tensor:
        if self.last is not None:  # as ModelEncoder.tokenize does; what it has folded stays as it is
            ends = tokens == tokens.amax(-1, keepdim=True)
            tokens = torch.where(ends, self.last, tokens % self.last)
        lengths = self.lengths(tokens)
        if self.kind == "clip_text":
            features = _clip_text(self.tower, tokens, lengths)
        elif self.kind == "huggingface":
            features = _text_encoder(self.tower, tokens, lengths)
        else:
            features = _called(self.tower, tokens, lengths)
        return F.normalize(features, dim=-1)


def _vit(tower: Any, pixels: Tensor) -> Tensor:
    """``clip_vit`` on pictures of its own size."""
    patches = tower.patch_embed(pixels).flatten(2).transpose(1, 2)  # [B, N, W]
    first = tower.class_token + tower.position_embedding[:1]
    if tower.register_tokens is not None:
        first = torch.cat([first, tower.register_tokens])
    x = torch.cat([first.expand(pixels.shape[0], -1, -1), patches + tower.position_embedding[1:]], 1)
    x = _blocks(tower.blocks, _norm(tower.norm_pre, x), causal=False)
    x = x if tower.norm_after_pool else _norm(tower.norm, x)
    pooled = x[:, tower.prefix :].mean(1) if tower.mean_pooling else x[:, 0]
    return cast(Tensor, (_norm(tower.norm, pooled) if tower.norm_after_pool else pooled) @ tower.projection)


def _clip_text(tower: Any, tokens: Tensor, lengths: Tensor) -> Tensor:
    """``clip_text`` on whole contexts, pads too: where it is causal, they come after all that is read."""
    x = tower.token_embedding(tokens) + tower.position_embedding[: tokens.shape[1]]
    x = _norm(tower.norm, _blocks(tower.blocks, x, causal=tower.causal))
    if tower.pooling == "end":
        pooled = x.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, x.shape[2]))[:, 0]
    else:
        pooled = x[:, 0] if tower.pooling == "first" else x[:, -1]
    return project(pooled, tower.projection, tower.projection_bias)


def _text_encoder(tower: Any, tokens: Tensor, lengths: Tensor) -> Tensor:
    """``huggingface``: pads are never attended to, so that the length of the batch changes nothing."""
    real = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    ids = torch.where(real, tokens, tower.pad_id)
    out = tower.model(input_ids=ids, attention_mask=real.long()).last_hidden_state
    pooled = out[:, 0] if tower.pooling == "cls" else (out * real[..., None]).sum(1) / lengths[:, None]
    return cast(Tensor, pooled @ tower.projection)


def _called(tower: Any, x: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Any other tower, by the contract that training calls it by."""
    group: ImageGroup | TextGroup
    if lengths is None:
        group = ImageGroup(pixels=x[None], params=x.new_empty(1, x.shape[0], 0))
    else:
        group = TextGroup(tokens=x[None], lengths=lengths[None])
    return cast(Tensor, tower({_GROUP: group}, {_GROUP: GroupPlan(views=(0,))})[_GROUP].projected[0])


def _blocks(blocks: Any, x: Tensor, *, causal: bool) -> Tensor:
    """Pre-norm blocks on [B, S, W]."""
    for block in blocks:
        split = block.attn.qkv(_norm(block.norm1, x)).unflatten(-1, (3, block.attn.heads, -1))  # [B, S, 3, H, d]
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
        x = x + block.ls1(block.attn.proj(attended))
        x = x + block.ls2(block.mlp.fc2(block.mlp.act(block.mlp.fc1(_norm(block.norm2, x)))))
    return x


def _norm(norm: Any, x: Tensor) -> Tensor:
    """A LayerNorm without what our own does about autocast; or nothing."""
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return cast(Tensor, norm(x))


def towers_of(encoder: ModelEncoder) -> list[Modality]:
    """The towers that it has. Raises UserError without any."""
    found: list[Modality] = [modality for modality in INPUTS if encoder.model.towers.get(modality) is not None]
    if not found:
        raise UserError("this model has neither an image nor a text tower")
    return found
