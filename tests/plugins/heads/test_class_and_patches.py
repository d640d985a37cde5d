"""dino.txt's head against its formula, by torch's own attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cosmos_ssl.api import Features, GroupFeatures, Need, Spec, TowerSpec, Views, ViewSpec
from cosmos_ssl_plugins.heads.class_and_patches import ClassAndPatches

SPEC = Spec(
    embed_dim=6,
    image=TowerSpec(width=12, patch_size=4),
    image_views={"global": ViewSpec(views=2, size=12), "local": ViewSpec(views=1, size=8)},
)
VIEWS = Views(keys=list("abcde"))


def group(views: int, patches: int) -> GroupFeatures:
    every, draw = tuple(range(views)), torch.Generator().manual_seed(patches)
    pooled, tokens = (torch.randn(views, 5, *shape, 12, generator=draw).requires_grad_() for shape in ((), (patches,)))
    return GroupFeatures(views=every, pooled=pooled, tokens=tokens, token_views=every)


def formula(head: ClassAndPatches, pooled: Tensor, tokens: Tensor) -> Tensor:
    """Sections 3.2 and 3.3: pre-norm blocks on [class; patches], norm, [class; mean of patches], one map of each."""
    x = torch.cat([pooled[:, :, None], tokens], 2).flatten(0, 1)
    for block in head.blocks:
        qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
        x = x + block.ls1.gamma * block.attn.proj(attended)
        x = x + block.ls2.gamma * block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    x = head.norm(x)
    halves = [half @ head.projection.weight.T for half in (x[:, 0], x[:, 1:].mean(1))]
    return torch.cat(halves, -1).unflatten(0, pooled.shape[:2])


def test_equals_the_formula_and_its_gradients() -> None:
    torch.manual_seed(0)
    head = ClassAndPatches(SPEC, heads=2, layer_scale=0.5)
    uniform = ClassAndPatches(SPEC, heads=2, drop_path=0.3, drop_path_uniform=True)
    assert [block.drop_path for block in uniform.blocks] == [0.3, 0.3]
    features = Features(image={"global": group(2, 9), "local": group(1, 4)})
    found = head(features, VIEWS, ("global", "local"))
    assert {name: x.shape[-1] for name, x in found.items()} == head.outputs() == {"global": 6, "local": 6}
    for name, x in found.items():
        own = features.image[name]
        assert own.pooled is not None and own.tokens is not None
        expected, leaves = formula(head, own.pooled, own.tokens), [own.pooled, own.tokens, *head.parameters()]
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-6)
        weight = torch.randn_like(x)
        gradients = [torch.autograd.grad((y * weight).sum(), leaves) for y in (x, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_pictures_and_texts_match_by_the_cosine() -> None:
    head = ClassAndPatches(SPEC, heads=2)
    texts = torch.randn(1, 3, 6)
    features = Features(image={"global": group(1, 9)}, text={"global": GroupFeatures(views=(0,), projected=texts)})
    image = head(features, VIEWS, ("global",))["global"][0]
    scores = head.match(head.match_input(features, "image"), head.match_input(features, "text"))
    torch.testing.assert_close(scores, F.cosine_similarity(image[:, None], texts, dim=-1))
    assert head.match_needs("text") == [Need(modality="text", group="global")]
    assert [need.kind for need in head.match_needs("image")] == ["pooled", "tokens"]


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(ValueError, match=r"model\.image"):
        ClassAndPatches(Spec(embed_dim=8))
    with pytest.raises(ValueError, match=r"embed_dim \(7\) has no two halves"):
        ClassAndPatches(Spec(embed_dim=7, image=TowerSpec(width=12)))
