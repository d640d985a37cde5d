"""The caption decoder and its loss against the formulas, written text by text and token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cosmos_ssl.api import Features, GroupFeatures, Spec, TextGroup, Views
from cosmos_ssl.testing import check_loss, example_context, example_spec, example_views
from cosmos_ssl_plugins.heads.caption_decoder import CaptionDecoder, token_nll
from cosmos_ssl_plugins.losses.captioning import Captioning

SPEC = example_spec()


def setting(**options: Any) -> tuple[CaptionDecoder, Views, Tensor]:
    """A decoder in float64, texts [2, 6, 12], and image tokens [1, 6, 16, 32]."""
    torch.manual_seed(0)
    head = CaptionDecoder(SPEC, **{"layers": 2, "width": 16, "num_heads": 2, **options}).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head, example_views(SPEC), torch.randn(1, 6, 16, 32, dtype=torch.float64, requires_grad=True)


def run(head: CaptionDecoder, views: Views, image: Tensor) -> Tensor:
    found = GroupFeatures(views=(0,), tokens=image, token_views=(0,))
    return head(Features(image={"global": found}), views, ("nll",))["nll"]  # type: ignore[no-any-return]


def attended(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool) -> Tensor:
    """Multi-head attention [L, W], [N, W] -> [L, W] by its formula."""
    outs = []
    for a, b, c in zip(*(x.chunk(heads, -1) for x in (q, k, v)), strict=True):
        logits = a @ b.T / math.sqrt(a.shape[1])
        if causal:
            logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -torch.inf)
        outs.append(logits.softmax(-1) @ c)
    return torch.cat(outs, -1)


def reference(head: CaptionDecoder, ids: Tensor, image: Tensor, parallel: bool = False) -> Tensor:
    """-log p of the tokens [L] of one text but the first, given image tokens [N, W] (CapPa, figure 2): [L - 1]."""
    tokens = head.image_tokens(image)
    x = head.token_embedding(ids[:-1])
    if parallel:
        assert head.mask_token is not None
        x = head.mask_token.expand_as(x)
    x = x + head.position_embedding[: len(x)]
    for block in head.blocks:
        own: Any = block
        q, k, v = own.attn.qkv(own.norm1(x)).chunk(3, -1)
        x = x + own.attn.proj(attended(q, k, v, 2, causal=not parallel))
        weights, biases = own.cross.qkv.weight.chunk(3), own.cross.qkv.bias.chunk(3)
        q = own.cross.norm_q(x) @ weights[0].T + biases[0]
        k, v = (own.cross.norm_kv(tokens) @ w.T + b for w, b in zip(weights[1:], biases[1:], strict=True))
        x = x + own.cross.proj(attended(q, k, v, 2, causal=False))
        x = x + own.mlp.fc2(F.gelu(own.mlp.fc1(own.norm2(x))))
    logits = head.norm(x) @ head.vocabulary.weight.T
    return logits.logsumexp(-1) - logits[torch.arange(len(x)), ids[1:]]


@pytest.mark.parametrize("parallel", [0.0, 1.0])
def test_values_and_gradients_are_the_formulas(parallel: float) -> None:
    head, views, image = setting(parallel=parallel)
    group = views.text["global"]
    nll = run(head, views, image)
    assert nll.shape == (2, 6, 12, 1) and nll.dtype == torch.float64
    loss = Captioning(example_spec(heads={"mine": {"nll": 1}}), head="mine")
    context = example_context(loss, example_spec(heads={"mine": {"nll": 1}}), views=views)
    context.student.heads["mine"]["nll"] = nll  # type: ignore[index]
    found = loss(context).terms["caption"]
    means = []
    for v in range(2):
        for b in range(6):
            length = int(group.lengths[v, b])
            whole = reference(head, group.tokens[v, b], image[0, b], parallel=bool(parallel))  # pads come last
            expected = whole[: length - 1]
            torch.testing.assert_close(nll[v, b, 1:length, 0], expected, rtol=1e-9, atol=1e-9)
            assert not nll[v, b, 0].any() and not nll[v, b, length:].any()
            means.append(expected.mean())
    expected = torch.stack(means).mean()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    inputs = [image, *(p for name, p in head.named_parameters() if not (parallel and name == "token_embedding.weight"))]
    for ours, theirs in zip(*(torch.autograd.grad(x, inputs) for x in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_half_of_the_texts_are_predicted_at_once_in_training_alone() -> None:
    head, views, image = setting(parallel=0.5)
    group = views.text["global"]
    torch.manual_seed(3)
    found = run(head, views, image)
    both = []
    for v in range(2):
        for b in range(6):
            own = found[v, b, 1 : int(group.lengths[v, b]), 0]
            cases = [reference(head, group.tokens[v, b], image[0, b], parallel=each) for each in (False, True)]
            both.append([torch.allclose(own, case[: len(own)], rtol=1e-6) for case in cases])
    assert all(sum(each) == 1 for each in both) and 0 < sum(parallel for _, parallel in both) < 12
    head.eval()
    torch.testing.assert_close(
        run(head, views, image)[0, 0, 1 : int(group.lengths[0, 0]), 0],
        reference(head, group.tokens[0, 0], image[0, 0])[: int(group.lengths[0, 0]) - 1],
    )


def test_no_more_logits_are_held_than_a_chunk() -> None:
    """Values and gradients are those of all at once; what backward keeps, and what it computes, is smaller."""
    torch.manual_seed(0)
    x, weight = (torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (50, 300))
    targets = torch.randint(300, (50,))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
        found = token_nll(x, weight, targets, chunk=2100)
    assert max(kept) <= weight.numel() < 50 * 300
    expected = F.cross_entropy(x @ weight.T, targets, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn(50, dtype=torch.float64)
    for ours, theirs in zip(
        *(torch.autograd.grad((y * direction).sum(), (x, weight)) for y in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert token_nll(x[:0], weight, targets[:0]).shape == (0,)


def test_texts_of_one_token_cost_nothing() -> None:
    head, views, image = setting()
    tokens = views.text["global"].tokens
    lone = TextGroup(tokens=tokens, lengths=torch.ones(2, 6, dtype=torch.int64))
    assert not run(head, Views(keys=views.keys, image=views.image, text={"global": lone}), image).any()


def test_two_ranks_find_what_one_does() -> None:
    decoder = {"type": "caption_decoder", "layers": 1, "width": 16, "num_heads": 2}
    check_loss("captioning", around={"heads": {"captions": decoder}}, head="captions", ranks=2)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs model.image and a tokenizer"):
        CaptionDecoder(Spec(embed_dim=8))
    with pytest.raises(ValueError, match="num_heads: 5 heads cannot share a width of 16"):
        CaptionDecoder(SPEC, width=16, num_heads=5)
    with pytest.raises(ValueError, match=r"head: no head 'cross' with an output 'nll'\. Heads that have it: none"):
        Captioning(SPEC, head="cross")
