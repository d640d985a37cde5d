"""CLIP's loss on a head's output, against its formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from cosmos_ssl.api import Need
from cosmos_ssl.testing import example_context, example_spec
from cosmos_ssl_plugins.losses.clip import Clip


def test_a_head_stands_for_the_image_feature() -> None:
    """Cross-entropy both ways (figure 3 of arXiv 2103.00020), over all pairs of views; loss and gradients to 1e-5."""
    spec = replace(example_spec(), heads={"mine": {"global": 32}, "narrow": {"global": 16}})
    loss = Clip(spec, head="mine")
    assert Need(head="mine", outputs=("global",), gathered=True) in loss.requires()
    context = example_context(loss, spec)
    images, texts = context.student.heads["mine"]["global"], context.student.stack("text")
    pairs = []
    for image in F.normalize(images, dim=-1):
        for text in F.normalize(texts, dim=-1):
            logits, own = loss.logit_scale.exp() * image @ text.T, torch.arange(len(image))
            pairs.append((F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2)
    found, expected = loss(context).terms["contrastive"], torch.stack(pairs).mean()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    leaves = [images, *(group.projected for group in context.student.text.values()), loss.logit_scale]
    gradients = [torch.autograd.grad(x, leaves) for x in (found, expected)]  # type: ignore[arg-type]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"no head 'narrow' with an output 'global' of model\.embed_dim \(32\).*mine$"):
        Clip(spec, head="narrow")
