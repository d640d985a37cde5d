"""Decoder and loss against plain references, written out from the paper's formulas: values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from cosmos_ssl_coca.decoder import CocaDecoder
from cosmos_ssl_coca.loss import Caption
from torch import Tensor, nn
from torch.nn import functional as F

from cosmos_ssl.api import Features, Need
from cosmos_ssl.testing import check_head, check_loss, example_context, example_features, example_spec, example_views

HEADS, QUERIES = 4, 5
SMALL = {"layers": 2, "num_heads": HEADS, "num_queries": QUERIES}
SPEC = example_spec(heads={"decoder": {"tokens": 24}, "cross": {"image": 32}})


@pytest.fixture
def decoder() -> CocaDecoder:
    torch.manual_seed(0)
    decoder = CocaDecoder(SPEC, **SMALL)
    for name, parameter in decoder.named_parameters():
        if name.endswith("bias") or "norm" in name:  # so that one in another's place is seen
            nn.init.normal_(parameter, std=0.5)
    return decoder.double()


def attend(parts: tuple[Tensor, Tensor, Tensor], out: nn.Module, q: Tensor, kv: Tensor, bias: Tensor) -> Tensor:
    """One query [W] over keys and values [K, ...]: a softmax of scaled dot products in each head."""
    width, (of_q, of_k, of_v) = len(q), bias.chunk(3)
    q, k, v = parts[0] @ q + of_q, kv @ parts[1].T + of_k, kv @ parts[2].T + of_v
    d = width // HEADS
    found = [(k[:, i : i + d] @ q[i : i + d] / math.sqrt(d)).softmax(0) @ v[:, i : i + d] for i in range(0, width, d)]
    return out(torch.cat(found))  # type: ignore[no-any-return]


def decoded(decoder: CocaDecoder, patches: Tensor, text: Tensor) -> Tensor:
    """One picture [N, W] and one text [S, W], a token at a time, which sees itself and those before."""
    pool = decoder.pool
    parts = (pool.q_proj_weight, pool.k_proj_weight, pool.v_proj_weight)
    picture = torch.stack([attend(parts, pool.out_proj, q, patches, pool.in_proj_bias) for q in decoder.queries])
    picture = decoder.pool_norm(picture)
    for layer in decoder.layers:
        own, other = layer.self_attn, layer.multihead_attn
        normed = layer.norm1(text)
        parts = own.in_proj_weight.chunk(3)
        text = text + torch.stack(
            [attend(parts, own.out_proj, x, normed[: i + 1], own.in_proj_bias) for i, x in enumerate(normed)]
        )
        parts = other.in_proj_weight.chunk(3)
        text = text + torch.stack(
            [attend(parts, other.out_proj, x, picture, other.in_proj_bias) for x in layer.norm2(text)]
        )
        text = text + layer.linear2(F.gelu(layer.linear1(layer.norm3(text))))
    return decoder.norm(text)  # type: ignore[no-any-return]


def test_decoder_is_the_formula(decoder: CocaDecoder) -> None:
    features = example_features(decoder.requires(("tokens",)), SPEC)
    patches, text = (
        getattr(features, name)["global"].tokens.detach().double().requires_grad_() for name in ("image", "text")
    )
    object.__setattr__(features.image["global"], "tokens", patches)
    object.__setattr__(features.text["global"], "tokens", text)
    found = decoder(features, example_views(SPEC), ("tokens",))["tokens"]
    plain = torch.stack(
        [torch.stack([decoded(decoder, patches[0, b], view[b]) for b in range(view.shape[0])]) for view in text]
    )
    torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-11)
    weights = torch.randn(found.shape, dtype=torch.float64)
    leaves = [patches, text, *decoder.parameters()]
    ours, theirs = (torch.autograd.grad((weights * x).sum(), leaves) for x in (found, plain))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 3 * 260, 1 << 25])
def test_loss_is_the_formula(chunk: int) -> None:
    """-log p of each token but the first, up to and with the end, a mean over all tokens; in any number of parts."""
    torch.manual_seed(0)
    loss, views = Caption(SPEC, head="decoder").double(), example_views(SPEC)
    loss.chunk = chunk
    text = views.text["global"]
    tokens = torch.randn(*text.tokens.shape, 24, dtype=torch.float64, requires_grad=True)
    context = example_context(loss, SPEC, views=views)
    object.__setattr__(context, "student", Features(heads={"decoder": {"tokens": tokens}}))
    found = loss(context)
    said = []
    for v, lengths in enumerate(text.lengths.tolist()):
        for b, length in enumerate(lengths):
            for t in range(1, length):
                log_p = (loss.vocabulary @ tokens[v, b, t - 1]).log_softmax(0)
                said.append(-log_p[text.tokens[v, b, t]])
    plain = torch.stack(said).mean()
    torch.testing.assert_close(found.terms["next_token"], plain, rtol=1e-10, atol=0)
    ours, theirs = (torch.autograd.grad(x, [tokens, loss.vocabulary]) for x in (found.terms["next_token"], plain))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    assert found.metrics["tokens"].item() == pytest.approx(len(said) / text.lengths.numel())


def test_a_token_is_said_by_those_before_it(decoder: CocaDecoder) -> None:
    """The need refuses a text tower that is not causal; the decoder itself leaks nothing."""
    assert [need.causal for need in decoder.requires(("tokens",)) if need.modality == "text"] == [True]
    features = example_features(decoder.requires(("tokens",)), SPEC)
    decoder.float()
    before = decoder(features, example_views(SPEC), ("tokens",))["tokens"]
    with torch.no_grad():
        features.text["global"].tokens[:, :, 7:].neg_()  # type: ignore[index]
    after = decoder(features, example_views(SPEC), ("tokens",))["tokens"]
    torch.testing.assert_close(before[:, :, :7], after[:, :, :7])
    assert not torch.allclose(before[:, :, 7:], after[:, :, 7:])


def test_parts_keep_to_the_contract() -> None:
    check_head("coca_decoder", **SMALL)
    check_loss("caption", around={"heads": {"decoder": {"type": "coca_decoder", **SMALL}}}, head="decoder", ranks=2)


def test_impossible_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_heads: model\.text\.width \(24\) is not a multiple of 5"):
        CocaDecoder(SPEC, num_heads=5)
    with pytest.raises(ValueError, match="needs both"):
        CocaDecoder(example_spec(image=None))
    with pytest.raises(ValueError, match=r"head: no decoder 'cross'\. Heads of that kind: decoder"):
        Caption(SPEC, head="cross")
    assert Caption(SPEC, head="decoder").requires()[0] == Need(head="decoder", outputs=("tokens",))
