"""COSMOS's distillation: the mean of four InfoNCE, of cross features or, without a head, of the student's own."""

import math
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from cosmos_ssl.api import Features, GroupFeatures, Need, Progress, Spec, StepContext, Views
from cosmos_ssl.functional import gather
from cosmos_ssl_plugins.losses.cross_modality_distillation import CrossModalityDistillation

SPEC = Spec(embed_dim=12, has_teacher=True, heads={"cross": {"image": 12, "text": 12}, "project": {"global": 12}})
SHAPES = {"image": {"global": 2, "local": 3}, "text": {"global": 2, "local": 1}}


def draw(seed, samples=6, modalities=SHAPES):
    """Features by modality and group, [V, B, 12]."""
    generator = torch.Generator().manual_seed(seed)
    return {
        m: {
            name: torch.randn(views, samples, 12, generator=generator, dtype=torch.float64)
            for name, views in groups.items()
        }
        for m, groups in modalities.items()
    }


def features(drawn, heads=None):
    groups = {
        m: {name: GroupFeatures(views=tuple(range(len(x))), projected=x) for name, x in groups.items()}
        for m, groups in drawn.items()
    }
    return Features(**groups, heads=heads or {})


def context(student, teacher, cross=None):
    everyone = {m: {"global": gather(groups["global"], dim=1)} for m, groups in teacher.items()}
    return StepContext(
        views=Views(keys=[]),
        student=features(student, {} if cross is None else {"cross": cross}),
        teacher=features(teacher),
        gathered={"student": Features(), "teacher": features(everyone)},
        progress=Progress(step=0, total_steps=1),
        head=lambda *_: {},
    )


def info_nce(views, targets, scale):
    """Symmetric cross-entropy, averaged over all pairs of views, as written in the CLIP paper."""
    found = []
    for x, y in product(F.normalize(views, dim=-1), F.normalize(targets, dim=-1)):
        logits, own = scale * x @ y.T, torch.arange(len(x))
        found.append((F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2)
    return torch.stack(found).mean()


def published(image, text, teacher, scale):
    """Section 3 of arXiv 2412.01814: image and text features against the teacher's global image and text features."""
    return sum(info_nce(x, teacher[m]["global"], scale) for x in (image, text) for m in ("image", "text")) / 4


def double(loss, scale=20.0):
    """The loss in float64, its scale at a value that float32 does not round."""
    loss = loss.double()
    torch.nn.init.constant_(loss.logit_scale, math.log(scale))
    return loss


def test_without_a_head_the_students_own_features_of_all_views_are_distilled():
    drawn, teacher = draw(0), draw(1)
    leaves = [x.requires_grad_() for groups in drawn.values() for x in groups.values()]
    loss = double(CrossModalityDistillation(SPEC))
    assert "ablation without a cross-attention head" in loss.notice()
    assert not CrossModalityDistillation(SPEC, head="cross").notice()
    term = loss(context(drawn, teacher)).terms["distillation"]
    image, text = (torch.cat(list(groups.values())) for groups in drawn.values())
    log_scale = torch.tensor(math.log(20.0), dtype=torch.float64, requires_grad=True)
    expected = published(image, text, teacher, log_scale.exp())
    torch.testing.assert_close(term, expected, rtol=1e-10, atol=1e-12)
    mine, plain = (
        torch.autograd.grad(term, [*leaves, loss.logit_scale]),
        torch.autograd.grad(expected, [*leaves, log_scale]),
    )
    for x, y in zip(mine, plain, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
    assert loss.requires() == [
        Need(modality="image", hidden=False),
        Need(modality="text", hidden=False),
        Need(role="teacher", modality="image", group="global", gathered=True),
        Need(role="teacher", modality="text", group="global", gathered=True),
    ]


def test_with_a_head_its_outputs_are_distilled():
    drawn, teacher = draw(0), draw(1)
    crossed = draw(2, modalities={"image": {"all": 5}, "text": {"all": 3}})
    cross = {m: groups["all"].requires_grad_() for m, groups in crossed.items()}
    loss = double(CrossModalityDistillation(SPEC, head="cross"))
    term = loss(context(drawn, teacher, cross)).terms["distillation"]
    expected = published(cross["image"], cross["text"], teacher, 20.0)
    torch.testing.assert_close(term, expected, rtol=1e-10, atol=1e-12)
    for x, y in zip(
        torch.autograd.grad(term, list(cross.values())),
        torch.autograd.grad(expected, list(cross.values())),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
    assert loss.requires()[0] == Need(head="cross", outputs=("image", "text"))


def test_the_teachers_entropy_is_that_of_its_matches():
    teacher = draw(1)
    metrics = double(CrossModalityDistillation(SPEC))(context(draw(0), teacher)).metrics
    image, text = (F.normalize(teacher[m]["global"][0], dim=-1) for m in ("image", "text"))
    entropy = torch.distributions.Categorical(logits=20.0 * image @ text.T).entropy().mean()
    torch.testing.assert_close(metrics["teacher_entropy"], entropy)
    torch.testing.assert_close(metrics["logit_scale"].item(), 20.0)


def _rank(rank, world, path, results):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    share = slice(rank * 6 // world, (rank + 1) * 6 // world)
    drawn, teacher = (
        {m: {n: x[:, share] for n, x in groups.items()} for m, groups in draw(seed).items()} for seed in (0, 1)
    )
    leaf = drawn["image"]["local"] = drawn["image"]["local"].clone().requires_grad_()
    term = double(CrossModalityDistillation(SPEC))(context(drawn, teacher)).terms["distillation"]
    results[rank] = term.detach(), torch.autograd.grad(term, leaf)[0]
    dist.destroy_process_group()


def test_two_ranks_are_one(in_ranks):
    results = in_ranks(_rank, 2)
    first, second = results[0], results[1]
    drawn, teacher = draw(0), draw(1)
    leaf = drawn["image"]["local"].requires_grad_()
    image, text = (torch.cat(list(groups.values())) for groups in drawn.values())
    expected = published(image, text, teacher, 20.0)
    torch.testing.assert_close((first[0] + second[0]) / 2, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.cat([first[1], second[1]], 1) / 2, torch.autograd.grad(expected, leaf)[0], rtol=1e-9, atol=1e-12
    )


def test_the_scale_starts_at_clips_and_stays_within_bounds():
    loss = CrossModalityDistillation(SPEC)
    assert loss.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    for value, kept in ((7.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        torch.nn.init.constant_(loss.logit_scale, value)
        loss.after_step()
        assert loss.logit_scale.item() == pytest.approx(kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "project"}, "head: no head 'project' with outputs 'image' and 'text'. Heads that have them: cross"),
        ({"head": "corss"}, "head: no head 'corss'"),
        ({"init_logit_scale": 0.5}, "init_logit_scale: 0.5 is outside 1..100"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CrossModalityDistillation(SPEC, **options)
