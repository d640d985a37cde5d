"""CLIP's text tower: recorded values, captions at their own length, pads, start values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cosmos_ssl.api import GroupPlan, Spec, TextGroup
from cosmos_ssl_plugins.towers.clip_text import ClipText
from cosmos_ssl_plugins.towers.clip_vit import ClipViT

Towers = Callable[..., tuple[ClipViT, ClipText]]
CONTEXT = 12


def small(**options: Any) -> ClipText:
    torch.manual_seed(0)
    spec = Spec(embed_dim=8, context_length=CONTEXT, vocab_size=50)
    text = ClipText(spec, **{"width": 32, "layers": 2, "heads": 2} | options).double()
    for parameter in text.parameters():  # larger than the start values, so that faults show
        torch.nn.init.normal_(parameter, std=0.3)
    return text


def random_texts(views: int, batch: int, seed: int = 1, context: int = CONTEXT) -> TextGroup:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, context + 1, (views, batch), generator=g)
    tokens = torch.randint(1, 49, (views, batch, context), generator=g)
    tokens = tokens.masked_fill(torch.arange(context) >= lengths[..., None], 0)
    return TextGroup(tokens=tokens.scatter(2, lengths[..., None] - 1, 49), lengths=lengths)


def plain(text: ClipText, ids: Tensor, words: Tensor | None = None) -> Tensor:
    """A straight padded transformer with this tower's weights: ids [n, S], or their words [n, S, W] -> [n, S, W]."""
    x = (text.token_embedding.weight[ids] if words is None else words) + text.position_embedding[: ids.shape[1]]
    for block in text.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.heads, -1)).permute(2, 0, 3, 1, 4)
        logits = q @ k.mT / q.shape[-1] ** 0.5
        if text.causal:
            logits = logits.masked_fill(torch.ones_like(logits[0, 0], dtype=torch.bool).triu(1), -torch.inf)
        x = x + block.attn.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    return text.norm(x)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_features_are_the_recorded_ones(
    golden: dict[str, Tensor], official_towers: Towers, role: str, backend: str
) -> None:
    _, text = official_towers(role, backend)
    ids = golden["texts"].long().unflatten(0, (8, 4))
    group = TextGroup(tokens=ids, lengths=ids.argmax(-1) + 1)
    views = tuple(range(8 if role == "student" else 2))
    for tokens in ((), (0,)):
        features = text({"all": group}, {"all": GroupPlan(views=views, tokens=tokens, pads=True)})
        torch.testing.assert_close(
            features["all"].unit.flatten(0, 1), golden[f"{role}.text_features"], atol=1e-5, rtol=0
        )


OPTIONS = [
    {},
    {"grad_checkpointing": True},
    {"layers": 1},
    {"causal": False},
    {"causal": False, "pooling": "first", "layers": 1},
    {"pooling": "last", "projection_bias": True, "norm_eps": 0.1},
]


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("batch", [3, 40])
def test_packed_captions_are_padded_ones(options: dict[str, Any], pads: bool, batch: int) -> None:
    text = small(**options)
    groups = {"global": random_texts(2, batch), "local": random_texts(3, batch, seed=2, context=9)}
    plan = {
        "global": GroupPlan(views=(0, 1), tokens=(1,), pads=pads),
        "local": GroupPlan(views=(2, 0), projected=False),
    }
    features = text(groups, plan)
    whole, local = (
        plain(text, groups[n].tokens[list(plan[n].views)].flatten(0, 1)).unflatten(0, (2, batch)) for n in plan
    )
    ends = [groups[n].lengths[list(plan[n].views)] - 1 for n in plan]
    tokens = whole[1:]
    if not pads:
        tokens = tokens * (torch.arange(CONTEXT) <= ends[0][1:, :, None])[..., None]
    places = {"end": ends, "first": [end * 0 for end in ends], "last": [ends[0] * 0 + CONTEXT - 1, ends[1] * 0 + 8]}
    ends = places[text.pooling]
    pooled = [
        x.gather(2, end[..., None, None].expand(-1, -1, 1, 32))[:, :, 0]
        for x, end in zip((whole, local), ends, strict=True)
    ]
    bias = 0 if text.projection_bias is None else text.projection_bias
    expected = [pooled[0] @ text.projection + bias, tokens, pooled[1]]
    found = [features["global"].projected, features["global"].tokens, features["local"].pooled]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)
    assert features["local"].projected is None

    weights = [torch.randn_like(x) for x in expected]
    parameters = dict(text.named_parameters())
    sums = [sum((x * w).sum() for x, w in zip(xs, weights, strict=True)) for xs in (found, expected)]
    gradients = [torch.autograd.grad(total, list(parameters.values())) for total in sums]
    for name, a, b in zip(parameters, *gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


def test_a_caption_costs_its_own_length() -> None:
    text = small()
    seen: list[int] = []
    for block in text.blocks:
        block.mlp.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    group = random_texts(3, 5)
    text({"global": group}, {"global": GroupPlan(views=(0, 1), tokens=(0,), pads=True)})
    assert seen == [5 * CONTEXT + int(group.lengths[1].sum()), 5 * CONTEXT + 5]


def test_start_values() -> None:
    torch.manual_seed(0)
    text = ClipText(Spec(embed_dim=64, context_length=77, vocab_size=1000), width=128, layers=2, heads=2)
    block = text.blocks[1]
    stds = {
        text.token_embedding.weight: 0.02,
        text.position_embedding: 0.01,
        text.projection: 128**-0.5,
        block.attn.qkv.weight: 128**-0.5,
        block.attn.proj.weight: 128**-0.5 * 4**-0.5,
        block.mlp.fc1.weight: 256**-0.5,
        block.mlp.fc2.weight: 128**-0.5 * 4**-0.5,
    }
    for parameter, std in stds.items():
        assert parameter.std().item() == pytest.approx(std, rel=0.05)
    assert not block.attn.qkv.bias.any()
    assert not block.attn.proj.bias.any()


def test_what_a_plan_leaves_unread_and_depths() -> None:
    text = small()
    assert text.unread({"global": GroupPlan(views=(0,), projected=False)}) == ("projection*",)
    assert text.unread({"global": GroupPlan(views=(0,))}) == ()
    assert text({}, {}) == {}
    assert text.layer_of("token_embedding.weight") == text.layer_of("position_embedding") == 0
    assert text.layer_of("blocks.0.norm1.weight") == 1
    assert text.layer_of("projection") == text.layer_count == 3


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="pooling: the first place sees nothing"):
        small(pooling="first")
    with pytest.raises(ValueError, match="heads: 5 heads cannot share a width of 32"):
        small(heads=5)


def test_masked_words() -> None:
    """Hidden words of one group, seen ones of another, in one pass; the same places of a teacher that sees all."""
    text = small(mask_token=True)
    given = random_texts(2, 3)
    masks = (given.tokens % 3 == 0) & (torch.arange(CONTEXT) < given.lengths[..., None])
    group = replace(given, masks=masks)
    hidden = GroupPlan(views=(1, 0), hide_masked=True, masked_tokens=True)
    features = text({"global": group, "hidden": group}, {"global": GroupPlan(views=(0, 1)), "hidden": hidden})
    ids, ends = group.tokens.flatten(0, 1), group.lengths.flatten() - 1
    for name, behind in (("global", masks & False), ("hidden", masks)):
        words = torch.where(behind.flatten(0, 1)[..., None], text.mask_token, text.token_embedding.weight[ids])
        expected = plain(text, ids, words)
        pooled = expected[torch.arange(len(ids)), ends].view(2, 3, -1)
        order = [1, 0] if name == "hidden" else [0, 1]
        torch.testing.assert_close(features[name].pooled, pooled[order], atol=1e-10, rtol=0)
    found = expected.view(2, 3, CONTEXT, -1)[[1, 0]][masks[[1, 0]]]
    torch.testing.assert_close(features["hidden"].masked_tokens, found, atol=1e-10, rtol=0)
    seen = text({"global": group}, {"global": GroupPlan(views=(1,), masked_tokens=True)})["global"].masked_tokens
    torch.testing.assert_close(seen, plain(text, ids).view(2, 3, CONTEXT, -1)[1][masks[1]], atol=1e-10, rtol=0)
    assert text.unread({"global": GroupPlan(views=(0,))}) == ("mask_token",)
    assert text.capabilities == {"tokens", "causal", "masks"} and "masks" not in small().capabilities
