"""The contrastive loss as a part: which features and texts it compares."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from cosmos_ssl.testing import example_context, example_spec
from cosmos_ssl_plugins.losses.clip import Clip

SPEC = example_spec(heads={"second": {"global": 32}, "narrow": {"global": 8}})


@pytest.mark.parametrize("head", [None, "second"])
def test_a_head_and_one_group_of_texts(head: str | None) -> None:
    """TIPS: each text is compared with an image embedding of its own; values and gradients."""
    loss = Clip(SPEC, head=head, text_group="local", init_logit_scale=10.0)
    ctx = example_context(loss, SPEC)
    assert list(ctx.student.text) == ["local"] and set(ctx.student.image) == ({"global"} if head is None else set())
    images = ctx.student.stack("image") if head is None else ctx.student.heads[head]["global"]
    texts = ctx.student.text["local"].projected
    assert texts is not None
    found = loss(ctx).terms["contrastive"]
    labels, pairs = torch.arange(6), []
    for image in F.normalize(images, dim=-1):
        for text in F.normalize(texts, dim=-1):
            logits = math.exp(loss.logit_scale.item()) * text @ image.T
            pairs.append((F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2)
    expected = torch.stack(pairs).mean()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(*(torch.autograd.grad(x, (images, texts)) for x in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_head_of_another_width_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^head: no head 'narrow' with an output 'global' of model\.embed_dim \(32\).*second$"
    ):
        Clip(SPEC, head="narrow")
