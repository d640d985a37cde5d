"""The sigmoid loss as a part, against OpenCLIP's."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from cosmos_ssl.api import Features, GroupFeatures, Need, Progress, Spec, StepContext, Views
from cosmos_ssl.functional import gather
from cosmos_ssl_plugins.losses.siglip import SigLip

SPEC = Spec(embed_dim=16)


def draw(views, samples, seed):
    return 3 * torch.randn(views, samples, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def group(features):
    return GroupFeatures(views=tuple(range(len(features))), projected=features)


def context(images, texts, locals_=None):
    """A step's context with the student's projected features; two groups of texts where ``locals_`` are given."""
    text = {"global": group(texts)} | ({} if locals_ is None else {"local": group(locals_)})
    own = Features(image={"global": group(images)}, text=text)
    gathered = {"student": Features(image={"global": group(gather(images, dim=1))}), "teacher": Features()}
    views = Views(keys=[str(n) for n in range(images.shape[1])])
    progress = Progress(step=0, total_steps=1)
    return StepContext(views=views, student=own, teacher=None, gathered=gathered, progress=progress, head=lambda *_: {})


def ours(images, texts, scale=10.0, bias=-10.0):
    """The term, and its gradients in images, texts, log-scale and bias."""
    loss = SigLip(SPEC, init_logit_bias=bias).double()
    torch.nn.init.constant_(loss.logit_scale, math.log(scale))  # in float64
    leaves = [x.clone().requires_grad_() for x in (images, texts)]
    term = loss(context(*leaves)).terms["contrastive"]
    return term, *torch.autograd.grad(term, [*leaves, loss.logit_scale, loss.logit_bias])


def open_clips(images, texts, scale=10.0, bias=-10.0):
    """OpenCLIP's loss of each pair of views, averaged, with the same gradients."""
    from open_clip.loss import SigLipLoss  # which takes seconds; ranks do without

    leaves = [x.clone().requires_grad_() for x in (images, texts)]
    log_scale = torch.tensor(math.log(scale), dtype=torch.float64, requires_grad=True)
    logit_bias = torch.tensor(bias, dtype=torch.float64, requires_grad=True)
    unit = [F.normalize(x, dim=-1) for x in leaves]
    term = torch.stack(
        [SigLipLoss()(image, text, log_scale.exp(), logit_bias) for image in unit[0] for text in unit[1]]
    ).mean()
    return term, *torch.autograd.grad(term, [*leaves, log_scale, logit_bias])


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (80.0, -16.0)])
@pytest.mark.parametrize(("image_views", "text_views"), [(1, 1), (2, 3)])
def test_loss_and_gradients_are_open_clips(image_views, text_views, scale, bias):
    images, texts = draw(image_views, 12, 0), draw(text_views, 12, 1)
    for mine, theirs in zip(ours(images, texts, scale, bias), open_clips(images, texts, scale, bias), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_starts_as_published():
    """Section 3.2 of arXiv 2303.15343: t' = log 10 and b = -10."""
    loss = SigLip(SPEC)
    assert {n: p.item() for n, p in loss.named_parameters()} == {
        "logit_scale": pytest.approx(math.log(10)),
        "logit_bias": -10,
    }


def test_all_texts_and_nobody_elses_local_crops():
    """Texts of every group count; gathered are the global images alone."""
    images, texts, locals_ = draw(1, 6, 0), draw(1, 6, 1), draw(2, 6, 2)
    output = SigLip(SPEC).double()(context(images, texts, locals_))
    torch.testing.assert_close(
        output.terms["contrastive"], open_clips(images, torch.cat([texts, locals_]))[0], rtol=1e-6, atol=1e-9
    )
    assert output.metrics["logit_scale"].item() == pytest.approx(10) and output.metrics["logit_bias"].item() == -10
    assert SigLip(SPEC).requires() == [
        Need(modality="image", group="global", kind="projected", hidden=False, gathered=True),
        Need(modality="text", kind="projected", hidden=False),
    ]


def _rank(rank, world, path, results):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    share = slice(rank * 8 // world, (rank + 1) * 8 // world)
    results[rank] = [x.detach().clone() for x in ours(draw(2, 8, 0)[:, share], draw(3, 8, 1)[:, share])]
    dist.destroy_process_group()


def test_two_ranks_are_one(in_ranks):
    results = in_ranks(_rank, 2)
    first, second = results[0], results[1]
    alone = ours(draw(2, 8, 0), draw(3, 8, 1))
    for number in (0, 3, 4):
        torch.testing.assert_close((first[number] + second[number]) / 2, alone[number], rtol=1e-10, atol=1e-12)
    for number in (1, 2):
        torch.testing.assert_close(
            torch.cat([first[number], second[number]], 1) / 2, alone[number], rtol=1e-10, atol=1e-12
        )


def test_a_scale_without_logarithm_is_refused():
    with pytest.raises(ValueError, match="init_logit_scale: -1 is outside"):
        SigLip(SPEC, init_logit_scale=-1)
