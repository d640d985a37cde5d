"""DreamLIP's grouping loss against the paper's formula, a sub-caption and a patch at a time."""

import math

import pytest
import torch
from torch.nn import functional as F

from cosmos_ssl.api import ViewSpec
from cosmos_ssl.testing import check_loss, example_context, example_spec
from cosmos_ssl_plugins.losses.subcaption_grouping import SubcaptionGrouping


def made(**options):
    torch.manual_seed(0)
    return SubcaptionGrouping(example_spec(), **options)


def group(text, patches, threshold):
    """The mean of unit patches by cosines that are scaled to 0..1, cut off and made to sum to one."""
    cosines = torch.stack([F.cosine_similarity(text, patch, dim=0) for patch in patches])
    scaled = (cosines - cosines.min()) / (cosines.max() - cosines.min())
    shares = [x if x >= threshold else 0 * x for x in scaled]
    return sum(share * patch / patch.norm() for share, patch in zip(shares, patches, strict=True)) / sum(shares)


def dense(loss, ctx, threshold):
    """-log of the share that a sub-caption has of its group, and the group of its sub-caption, over those of one
    picture or all.
    """
    tokens, texts, scale = ctx.student.image["global"].tokens, ctx.student.stack("text"), loss.logit_scale.exp()
    found = []
    for view in tokens:
        pictures = [(picture @ loss.patches.weight.T, own) for picture, own in zip(view, texts.unbind(1), strict=True)]
        groups_of = [[group(text, picture, threshold) for text in own] for picture, own in pictures]
        parts = [(groups, own) for groups, (_, own) in zip(groups_of, pictures, strict=True)]
        if loss.across:
            parts = [([g for groups in groups_of for g in groups], torch.cat([own for _, own in pictures]))]
        for groups, own in parts:
            rows = torch.stack([torch.stack([F.cosine_similarity(g, t, dim=0) for t in own]) for g in groups])
            odds = (scale * rows).exp()
            found += [-(odds[k, k] / odds[k].sum()).log() / 2 for k in range(len(own))]
            found += [-(odds[k, k] / odds[:, k].sum()).log() / 2 for k in range(len(own))]
    return 2 * torch.stack(found).mean()


@pytest.mark.parametrize(
    ("threshold", "negatives"), [(None, "image"), (0.0, "image"), (0.6, "image"), (1.0, "image"), (None, "batch")]
)
def test_loss_and_gradients_are_those_of_the_formula(threshold, negatives):
    loss = made(threshold=threshold, negatives=negatives)
    ctx = example_context(loss)
    texts = [part.projected for part in ctx.student.text.values()]
    leaves = [ctx.student.image["global"].tokens, *texts, loss.patches.weight, loss.logit_scale]
    output, plain = loss(ctx), dense(loss, ctx, 1 / 16 if threshold is None else threshold)
    torch.testing.assert_close(output.terms["grouping"], plain, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(*(torch.autograd.grad(x, leaves) for x in (output.terms["grouping"], plain)), strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert output.metrics["logit_scale"].item() == pytest.approx(1 / 0.07)


def test_ranks_share_the_negatives_of_the_batch():
    check_loss("subcaption_grouping", negatives="batch", ranks=2)


def test_patches_all_alike_are_no_fault():
    loss = made()
    ctx = example_context(loss)
    tokens = ctx.student.image["global"].tokens
    tokens.data.copy_(tokens.data[:, :, :1].clone())
    value = loss(ctx).terms["grouping"]
    gradient, *_ = torch.autograd.grad(value, [tokens])
    assert value.isfinite() and gradient.isfinite().all()


def test_the_scale_stays_within_bounds_and_what_cannot_be_is_refused():
    loss = made(init_logit_scale=100.0)
    loss.logit_scale.data.fill_(9.0)
    loss.after_step()
    assert loss.logit_scale.item() == pytest.approx(math.log(100))
    with pytest.raises(ValueError, match=r"init_logit_scale: 0\.5 is outside"):
        made(init_logit_scale=0.5)
    with pytest.raises(ValueError, match="told apart, and there are 1"):
        SubcaptionGrouping(example_spec(text_views={"global": ViewSpec(views=1)}))
