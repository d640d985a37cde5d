"""COSMOS the plain way, for the benchmarks to be compared with: the same losses from the usual modules.

Captions padded to the context length, one pass an image size, multi-head attention modules, cross-attention called view
by view with token maps for every view, every pair of views with its full logits, an EMA and an AdamW that go parameter
by parameter. One process. Weights are taken from a model of ours, so that losses can be compared.

Shape letters: B samples, N patches, S context length, W tower width, D shared width.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cosmos_ssl.api import Views
from cosmos_ssl.models.model import Model

_LAYER = {
    "norm1": "norm1",
    "norm2": "norm2",
    "mlp.fc1": "linear1",
    "mlp.fc2": "linear2",
    "attn.proj": "self_attn.out_proj",
}


def _layers(state: Mapping[str, Tensor], prefix: str, heads: int) -> nn.ModuleList:
    """Pre-norm encoder layers with the weights of our packed blocks."""
    count = 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix))
    width = state[f"{prefix}0.norm1.weight"].shape[0]
    hidden = state[f"{prefix}0.mlp.fc1.weight"].shape[0]
    layers = nn.ModuleList(
        nn.TransformerEncoderLayer(
            width, heads, hidden, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        for _ in range(count)
    )
    for number, layer in enumerate(layers):
        own = {
            f"{theirs}.{leaf}": state[f"{prefix}{number}.{ours}.{leaf}"]
            for ours, theirs in _LAYER.items()
            for leaf in ("weight", "bias")
        }
        own |= {f"self_attn.in_proj_{leaf}": state[f"{prefix}{number}.attn.qkv.{leaf}"] for leaf in ("weight", "bias")}
        layer.load_state_dict(own)
    return layers


def _norm(state: Mapping[str, Tensor], name: str) -> nn.LayerNorm:
    norm = nn.LayerNorm(len(state[f"{name}.weight"]))
    norm.load_state_dict({leaf: state[f"{name}.{leaf}"] for leaf in ("weight", "bias")})
    return norm


class ImageTower(nn.Module):
    """Pictures of one size -> pooled features in the shared space [B, D] and patch tokens [B, N, W]."""

    def __init__(self, state: Mapping[str, Tensor], heads: int, patch_size: int) -> None:
        super().__init__()
        weight = state["image.patch_embed.weight"]
        self.patch_embed = nn.Conv2d(3, weight.shape[0], patch_size, stride=patch_size, bias=False)
        self.patch_embed.load_state_dict({"weight": weight})
        self.class_token = nn.Parameter(state["image.class_token"].clone())
        self.positions = nn.Parameter(state["image.position_embedding"].clone())
        self.norm_pre, self.norm = _norm(state, "image.norm_pre"), _norm(state, "image.norm")
        self.layers = _layers(state, "image.blocks.", heads)
        self.projection = nn.Parameter(state["image.projection"].clone())

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patch_embed(pixels)
        grid = x.shape[-1]
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], 1)
        x = self.norm_pre(x + self._positions(grid))
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return x[:, 0] @ self.projection, x[:, 1:]

    def _positions(self, grid: int) -> Tensor:
        side = round((len(self.positions) - 1) ** 0.5)
        if grid == side:
            return self.positions
        table = self.positions[1:].view(1, side, side, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(table, scale_factor=(grid + 0.1) / side, mode="bicubic")
        return torch.cat([self.positions[:1], resized.permute(0, 2, 3, 1).flatten(0, 2)])


class TextTower(nn.Module):
    """Token ids [B, S] -> pooled features in the shared space [B, D] and token features [B, S, W]."""

    def __init__(self, state: Mapping[str, Tensor], heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding.from_pretrained(state["text.token_embedding.weight"].clone(), freeze=False)
        self.positions = nn.Parameter(state["text.position_embedding"].clone())
        self.layers = _layers(state, "text.blocks.", heads)
        self.norm = _norm(state, "text.norm")
        self.projection = nn.Parameter(state["text.projection"].clone())
        self.register_buffer("mask", torch.full((len(self.positions),) * 2, -torch.inf).triu(1), persistent=False)

    def forward(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        x = self.tokens(ids) + self.positions
        for layer in self.layers:
            x = layer(x, src_mask=self.mask)
        x = self.norm(x)
        return x[torch.arange(len(x)), lengths - 1] @ self.projection, x


class CrossAttention(nn.Module):
    """One view's feature [B, D] asks tokens [B, N, D]."""

    def __init__(self, state: Mapping[str, Tensor], name: str, heads: int) -> None:
        super().__init__()
        self.norm_q, self.norm_kv = _norm(state, f"{name}.norm_q"), _norm(state, f"{name}.norm_kv")
        self.attention = nn.MultiheadAttention(self.norm_q.normalized_shape[0], heads, batch_first=True)
        own = {f"in_proj_{leaf}": state[f"{name}.qkv.{leaf}"] for leaf in ("weight", "bias")}
        self.attention.load_state_dict(
            own | {f"out_proj.{leaf}": state[f"{name}.proj.{leaf}"] for leaf in ("weight", "bias")}
        )

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        kv = self.norm_kv(tokens)
        return self.attention(self.norm_q(query)[:, None], kv, kv, need_weights=False)[0][:, 0]


class PlainCosmos(nn.Module):
    """Student or teacher; ``heads`` are those of image tower, text tower and cross-attention."""

    def __init__(self, model: Model, heads: tuple[int, int, int], patch_size: int) -> None:
        super().__init__()
        state = {name: value.detach() for name, value in model.state_dict().items()}
        self.image, self.text = ImageTower(state, heads[0], patch_size), TextTower(state, heads[1])
        self.logit_scale = nn.Parameter(state["losses.clip.logit_scale"].clone())
        self.cross = "heads.cross.image_tokens.weight" in state
        if self.cross:
            self.distill_scale = nn.Parameter(state["losses.distill.logit_scale"].clone())
            self.image_tokens, self.text_tokens = (
                nn.Linear(*state[f"heads.cross.{m}_tokens.weight"].T.shape) for m in ("image", "text")
            )
            for modality in ("image", "text"):
                own = {leaf: state[f"heads.cross.{modality}_tokens.{leaf}"] for leaf in ("weight", "bias")}
                getattr(self, f"{modality}_tokens").load_state_dict(own)
            self.image_asks_text = CrossAttention(state, "heads.cross.image_asks_text", heads[2])
            self.text_asks_image = CrossAttention(state, "heads.cross.text_asks_image", heads[2])

    def encode(
        self, views: Views, groups: Sequence[str]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Unit features and mapped tokens of every view, images then texts: four lists over views."""
        images, image_tokens, texts, text_tokens = [], [], [], []
        for name in groups:
            if name in views.image:  # one pass a size: the views of a group are stacked
                group = views.image[name]
                pooled, tokens = self.image(group.pixels.flatten(0, 1))
                tokens = self.image_tokens(tokens) if self.cross else tokens
                images += pooled.chunk(group.shape[0])
                image_tokens += tokens.chunk(group.shape[0])
        chosen = [views.text[name] for name in groups if name in views.text]
        pooled, tokens = self.text(
            torch.cat([g.tokens.flatten(0, 1) for g in chosen]), torch.cat([g.lengths.flatten() for g in chosen])
        )
        tokens = self.text_tokens(tokens) if self.cross else tokens
        count = sum(g.shape[0] for g in chosen)
        texts += pooled.chunk(count)
        text_tokens += tokens.chunk(count)
        return images, image_tokens, texts, text_tokens


def info_nce(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy of one pair of views, with its full logits."""
    logits = scale * a @ b.T
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _mean(pairs: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(pairs)).mean()


class PlainStep:
    """One training step: teacher, student, losses, backward, EMA, AdamW."""

    def __init__(self, student: PlainCosmos, *, momentum: float, lr: float, weight_decay: float) -> None:
        self.student = student
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.momentum = momentum
        decayed = [p for p in student.parameters() if p.dim() >= 2]
        others = [p for p in student.parameters() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-8, foreach=False, fused=False)

    def losses(self, views: Views) -> dict[str, Tensor]:
        """``clip`` and, with cross-attention, ``distill``."""
        groups = list(dict.fromkeys([*views.image, *views.text]))
        images, image_tokens, texts, text_tokens = self.student.encode(views, groups)
        global_images = images[: views.image["global"].shape[0]]
        unit = [F.normalize(x, dim=-1) for x in global_images], [F.normalize(x, dim=-1) for x in texts]
        scale = self.student.logit_scale.exp()
        found = {"clip": _mean([info_nce(t, i, scale) for i, t in itertools.product(*unit)])}
        if self.student.cross:
            with torch.no_grad():
                taught = self.teacher.encode(views, ["global"])
                teachers = [[F.normalize(x, dim=-1) for x in taught[k]] for k in (0, 2)]
            cross = [
                [F.normalize(x + self.student.image_asks_text(x, text_tokens[0]), dim=-1) for x in images],
                [F.normalize(x + self.student.text_asks_image(x, image_tokens[0]), dim=-1) for x in texts],
            ]
            scale = self.student.distill_scale.exp()
            sides = itertools.product(cross, teachers)
            found["distill"] = _mean(
                [_mean([info_nce(s, t, scale) for s, t in itertools.product(*side)]) for side in sides]
            )
        return found

    def __call__(self, views: Views) -> dict[str, Tensor]:
        """One step; the losses, detached."""
        self.optimizer.zero_grad()
        found = self.losses(views)
        torch.stack(list(found.values())).sum().backward()
        with torch.no_grad():
            for own, other in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                own.mul_(self.momentum).add_(other, alpha=1 - self.momentum)
        self.optimizer.step()
        return {name: value.detach() for name, value in found.items()}
