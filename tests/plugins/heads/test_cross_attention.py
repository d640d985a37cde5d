"""COSMOS's cross-attention head against torch.nn.MultiheadAttention, and what it asks for."""

from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cosmos_ssl.api import Features, GroupFeatures, Spec, TextGroup, TowerSpec, Views, ViewSpec
from cosmos_ssl.api.views import map_tensors
from cosmos_ssl_plugins.heads.cross_attention import CrossAttention

SPEC = Spec(
    embed_dim=16,
    image=TowerSpec(width=12),
    text=TowerSpec(width=10),
    image_views={"global": ViewSpec(views=2, size=32), "local": ViewSpec(views=3, size=16)},
    text_views={"global": ViewSpec(views=2)},
)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    features = Features(
        image={
            "global": GroupFeatures(
                views=(0, 1), projected=torch.randn(2, 4, 16), tokens=torch.randn(1, 4, 6, 12), token_views=(0,)
            ),
            "local": GroupFeatures(views=(0, 1, 2), projected=torch.randn(3, 4, 16)),
        },
        text={
            "global": GroupFeatures(
                views=(0, 1), projected=torch.randn(2, 4, 16), tokens=torch.randn(1, 4, 7, 10), token_views=(0,)
            )
        },
    )
    lengths = torch.tensor([[3, 7, 1, 5], [2, 2, 2, 2]])
    views = Views(
        keys=list("abcd"), text={"global": TextGroup(tokens=torch.zeros(2, 4, 7, dtype=torch.int64), lengths=lengths)}
    )
    return features, views


def expected(ask, query, tokens, hidden=None):
    """The published form: one call of the usual module a view, keys repeated, result added to the query."""
    reference = nn.MultiheadAttention(16, 8, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(ask.qkv.weight)
        reference.in_proj_bias.copy_(ask.qkv.bias)
        reference.out_proj.load_state_dict(ask.proj.state_dict())
    kv = ask.norm_kv(tokens)
    found = [reference(ask.norm_q(x)[:, None], kv, kv, key_padding_mask=hidden) for x in query]
    features = torch.stack([F.normalize(x + out[:, 0], dim=-1) for x, (out, _) in zip(query, found, strict=True)])
    return features, torch.stack([weights[:, 0] for _, weights in found])


@pytest.mark.parametrize("mask", [False, True])
def test_equals_the_usual_module_called_view_by_view(batch, mask):
    features, views = batch
    head = CrossAttention(SPEC, num_heads=8, mask_padding=mask)
    nn.init.normal_(head.image_asks_text.qkv.bias)
    out = head(features, views, ("image", "text"))
    hidden = torch.arange(7) >= views.text["global"].lengths[0][:, None] if mask else None
    text_tokens = head.text_tokens(features.text["global"].tokens[0])
    image, image_weights = expected(head.image_asks_text, features.stack("image"), text_tokens, hidden)
    text, text_weights = expected(
        head.text_asks_image, features.stack("text"), head.image_tokens(features.image["global"].tokens[0])
    )
    torch.testing.assert_close(out["image"], image, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out["text"], text, rtol=1e-5, atol=1e-6)
    weights = head.attention_weights(features, views, mask_padding=mask)
    torch.testing.assert_close(weights["image"], image_weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights["text"], text_weights, rtol=1e-5, atol=1e-6)


def test_under_autocast_features_of_any_precision_give_nearly_the_same(batch):
    """0.5 % of unit features, bfloat16's rounding; 2 % of gradients, which are float32."""
    features, views = batch
    head = CrossAttention(SPEC, num_heads=8)

    def found(features):
        out = head(features, views, ("image", "text"))
        assert all(x.dtype == torch.float32 for x in out.values())
        loss = sum((x[..., 0] * x[..., 1]).sum() for x in out.values())
        return *out.values(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(head.parameters()))])

    exact = found(features)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            rough = found(map_tensors(features, lambda x, dtype=dtype: x.to(dtype)))
        for x, wanted, part in zip(rough, exact, (0.005, 0.005, 0.02), strict=True):
            assert x.dtype == torch.float32 and (x - wanted).norm() < part * wanted.norm()


def test_pads_are_asked_for_unless_masked():
    heads = CrossAttention(SPEC), CrossAttention(SPEC, mask_padding=True)
    assert [[need.pads for need in head.requires(["image"]) if need.kind == "tokens"] for head in heads] == [
        [True],
        [False],
    ]


@pytest.mark.parametrize(("output", "other"), [("image", "text"), ("text", "image")])
def test_an_output_alone_is_the_same_and_asks_for_less(batch, output, other):
    features, views = batch
    head = CrossAttention(SPEC)
    both = head(features, views, ("image", "text"))
    alone = head(features, views, (output,))
    assert set(alone) == {output}
    assert torch.equal(alone[output], both[output])
    needs = head.requires((output,))
    assert {(need.modality, need.kind) for need in needs} == {(output, "projected"), (other, "tokens")}
    alone[output].sum().backward()
    unread = head.unread((output,))
    reached = {name for name, parameter in head.named_parameters() if parameter.grad is not None}
    assert reached == {
        name for name, _ in head.named_parameters() if not any(fnmatchcase(name, pattern) for pattern in unread)
    }


def test_impossible_options_are_named():
    with pytest.raises(ValueError, match=r"num_heads: .*16.* not a multiple of 5"):
        CrossAttention(SPEC, num_heads=5)
    with pytest.raises(ValueError, match=r"model\.image and model\.text"):
        CrossAttention(Spec(embed_dim=16, text=TowerSpec(width=10)))
