"""DINO's loss against lightly's, its centre and Sinkhorn-Knopp, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightly.loss import DINOLoss
from lightly.loss.swav_loss import sinkhorn as lightlys_sinkhorn
from torch import Tensor

from cosmos_ssl.api import Features, LossOutput, Need, Progress, Spec, StepContext, Views, ViewSpec
from cosmos_ssl_plugins.losses.dino import Dino
from cosmos_ssl_plugins.losses.targets import TeacherTargets, sinkhorn

SPEC = Spec(
    embed_dim=8,
    has_teacher=True,
    image_views={"local": ViewSpec(views=3), "global": ViewSpec(views=2, masks=True)},
    heads={"mine": {"global": 7, "local": 7, "global_masked": 7}, "cross": {"image": 4}},
)
PROGRESS = Progress(step=0, total_steps=10)
TEMP = 1 / 16
"""Exact in float32: lightly holds its temperature so."""


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def run(loss: Dino, student: dict[str, Tensor], teacher: Tensor, progress: Progress = PROGRESS) -> LossOutput:
    context = StepContext(
        views=Views(keys=[""] * teacher.shape[1]),
        student=Features(heads={"mine": student}),
        teacher=Features(heads={"mine": {"global": teacher.detach()}}),
        gathered={},
        progress=progress,
        head=lambda *_: {},
    )
    return loss(context)  # type: ignore[no-any-return]


def make(**options: Any) -> Dino:
    return Dino(SPEC, head="mine", **options).double()


@pytest.mark.parametrize("views", [(1, 3), (2, 0), (2, 3), (3, 2)])
def test_equals_lightly_over_three_steps(views: tuple[int, int]) -> None:
    """Loss, gradients and centre, float64, to 1e-12."""
    whole, parts = views
    groups = {"global": ViewSpec(views=whole)} | ({"local": ViewSpec(views=parts)} if parts else {})
    ours = Dino(
        Spec(embed_dim=8, image_views=groups, heads={"mine": dict.fromkeys(groups, 7)}),
        head="mine",
        teacher_temp=TEMP,
        center_momentum=0.8,
    ).double()
    theirs = DINOLoss(output_dim=7, teacher_temp=TEMP, student_temp=0.1, center_momentum=0.8).double()
    for step in range(3):
        student = {"global": leaf(whole, 5, 7, seed=step)} | (
            {"local": leaf(parts, 5, 7, seed=step + 10)} if parts else {}
        )
        teacher = leaf(whole, 5, 7, seed=step + 20).detach()
        loss = run(ours, student, teacher).terms["distillation"]
        expected = theirs(list(teacher), [view for group in student.values() for view in group])
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        gradients = [torch.autograd.grad(x, list(student.values())) for x in (loss, expected)]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(ours.targets.center, theirs.center.view(7), rtol=1e-12, atol=1e-15)


def test_pairs_of_the_same_view_are_left_out() -> None:
    """A sure teacher and a student that is sure of another prototype in the same view alone: nothing is lost."""
    sure = torch.eye(7, dtype=torch.float64)[[0, 1]].mul(50)[:, None]  # [2, 1, 7]
    student = {"global": sure.flip(0), "local": torch.zeros(3, 1, 7, dtype=torch.float64)}
    loss = run(make(student_temp=1.0), student, sure).terms["distillation"]
    # 2 pairs of a global view with the other teacher view: 0; 6 pairs of a local view: ln 7
    torch.testing.assert_close(loss, 6 / 8 * torch.tensor(7.0, dtype=torch.float64).log())


def test_the_teacher_sees_one_group_and_the_student_others() -> None:
    """SigLIP 2, TIPS: the mean over pairs of the teacher's view and local ones of cross-entropies; values and
    gradients.
    """
    spec = Spec(embed_dim=8, image_views=SPEC.image_views, heads={"mine": {"global": 7, "teacher": 7, "local": 7}})
    loss = Dino(spec, head="mine", group="global", student_groups=["local"], teacher_temp=TEMP).double()
    assert [(need.role, need.outputs) for need in loss.requires()] == [
        ("student", ("local",)),
        ("teacher", ("global",)),
    ]
    student, teacher = leaf(3, 5, 7), leaf(1, 5, 7, seed=1)
    found = run(loss, {"local": student}, teacher).terms["distillation"]
    targets = (teacher.detach()[0] / TEMP).softmax(-1)
    terms = [-(targets[b] * (student[v, b] / 0.1).log_softmax(-1)).sum() for v in range(3) for b in range(5)]
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (found, expected)), rtol=1e-12, atol=1e-15)
    with pytest.raises(ValueError, match="student_groups: no view group 'teacher' of the head 'mine'"):
        Dino(spec, head="mine", student_groups=["teacher"])
    with pytest.raises(ValueError, match="head: no head 'mine' with an output 'other'"):
        Dino(spec, head="mine", group="other")


def test_sinkhorn_equals_lightly_and_the_published_algorithm() -> None:
    scores = leaf(12, 7).detach()
    ours = sinkhorn(scores / TEMP, 3)
    torch.testing.assert_close(ours, lightlys_sinkhorn(scores, iterations=3, epsilon=TEMP), rtol=1e-10, atol=1e-12)
    q = (scores / TEMP).exp()  # SwAV, listing 1, with samples as rows
    for _ in range(3):
        q = q / q.sum(0) / 7
        q = q / q.sum(1, keepdim=True) / 12
    torch.testing.assert_close(ours, q * 12, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        sinkhorn(scores / TEMP, 200).sum(0), torch.full((7,), 12 / 7).double(), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("spread", [1e2, 1e4, 1e30])
def test_sinkhorn_holds_any_scores(spread: float) -> None:
    """float32, where exp(89) is too large already: distributions stay distributions."""
    found = sinkhorn(leaf(12, 7).detach().float() * spread, 3)
    assert found.isfinite().all() and (found >= 0).all()
    assert sinkhorn(torch.empty(0, 7), 3).shape == (0, 7)
    torch.testing.assert_close(sinkhorn(leaf(12, 7).detach().float() * 1e2, 3).sum(1), torch.ones(12))


def test_sinkhorn_in_the_loss() -> None:
    student, teacher = {"global": leaf(2, 5, 7), "local": leaf(3, 5, 7, seed=1)}, leaf(2, 5, 7, seed=2)
    loss = make(centering="sinkhorn", sinkhorn_iterations=4)
    assert not list(loss.buffers())
    found = run(loss, student, teacher).terms["distillation"]
    targets = lightlys_sinkhorn(teacher.detach().flatten(0, 1), iterations=4, epsilon=0.04).view(
        2, 5, 7
    )  # both views share the prototypes
    log_p = (torch.cat([student["global"], student["local"]]) / 0.1).log_softmax(-1)
    pairs = [-(targets[t] * log_p[s]).sum(-1).mean() for t in range(2) for s in range(5) if s != t]
    torch.testing.assert_close(found, torch.stack(pairs).mean(), rtol=1e-10, atol=0)


def test_temperature_rises_linearly_over_the_warm_up() -> None:
    loss = make(warmup_teacher_temp=0.04, teacher_temp=0.07, warmup_teacher_temp_epochs=30)
    at = {
        epoch: loss.targets.temperature(Progress(step=epoch * 5, total_steps=500, steps_per_epoch=5))
        for epoch in (0, 15, 30, 60)
    }
    assert at == pytest.approx({0: 0.04, 15: 0.055, 30: 0.07, 60: 0.07})
    half = Progress(step=7, total_steps=500, steps_per_epoch=14)  # half an epoch
    output = run(loss, {"global": leaf(2, 5, 7), "local": leaf(3, 5, 7)}, leaf(2, 5, 7), half)
    assert output.metrics["teacher_temp"].item() == pytest.approx(0.0405)
    assert make(teacher_temp=0.07).targets.temperature(PROGRESS) == 0.07  # no warm-up


def test_temperature_is_used() -> None:
    student, teacher = {"global": leaf(2, 5, 7), "local": leaf(3, 5, 7, seed=1)}, leaf(2, 5, 7, seed=2)
    warm = make(warmup_teacher_temp=0.5, teacher_temp=0.1, warmup_teacher_temp_epochs=2)
    progress = Progress(step=1, total_steps=10, steps_per_epoch=1)
    found, plain = run(warm, student, teacher, progress), run(make(teacher_temp=0.3), student, teacher)
    torch.testing.assert_close(found.terms["distillation"], plain.terms["distillation"])


def test_teacher_entropy() -> None:
    student = {"global": leaf(2, 5, 7), "local": leaf(3, 5, 7)}
    even, sure = torch.zeros(2, 5, 7), torch.eye(7)[:5].mul(9).expand(2, 5, 7)
    assert run(make(), student, even).metrics["teacher_entropy"].item() == pytest.approx(torch.tensor(7.0).log().item())
    assert run(make(), student, sure).metrics["teacher_entropy"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_leaves_the_centre(poison: float) -> None:
    targets = TeacherTargets(
        7,
        centering="center",
        warmup_teacher_temp=0.04,
        teacher_temp=0.04,
        warmup_teacher_temp_epochs=0,
        center_momentum=0.9,
        sinkhorn_iterations=3,
    )
    targets(torch.ones(4, 7), PROGRESS)
    before = targets.center.clone()  # type: ignore[union-attr]
    torch.testing.assert_close(before, torch.full((7,), 0.1))
    bad = torch.ones(4, 7)
    bad[1, 2] = poison
    targets(bad, PROGRESS)
    targets(torch.empty(0, 7), PROGRESS)
    assert torch.equal(targets.center, before)  # type: ignore[arg-type]


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher = {"global": leaf(2, 5, 7), "local": leaf(3, 5, 7, seed=1)}, leaf(2, 5, 7, seed=2)
    half = {name: x.detach().bfloat16() for name, x in student.items()}
    found = run(Dino(SPEC, head="mine"), half, teacher.bfloat16()).terms["distillation"]
    plain = run(make(), {name: x.double() for name, x in half.items()}, teacher.bfloat16().double()).terms[
        "distillation"
    ]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), plain, rtol=1e-5, atol=0)


def test_requirements() -> None:
    """The teacher runs on global views alone; other outputs of the head are left to others."""
    assert make().requires() == [
        Need(head="mine", outputs=("global", "local")),
        Need(role="teacher", head="mine", outputs=("global",)),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "other"}, "head: no head 'other' with an output 'global'. Heads that have it: mine"),
        ({"head": "cross"}, "head: no head 'cross'"),
        ({"center_momentum": 1}, "center_momentum: 1"),
    ],
)
def test_impossible_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dino(SPEC, **({"head": "mine"} | options))


def test_a_single_view_is_refused() -> None:
    spec = Spec(embed_dim=8, image_views={"global": ViewSpec(views=1)}, heads={"mine": {"global": 7}})
    with pytest.raises(ValueError, match="needs two views"):
        Dino(spec, head="mine")
