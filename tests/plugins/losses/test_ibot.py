"""iBOT's patch loss against lightly's, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightly.loss import IBOTPatchLoss
from lightly.loss.swav_loss import sinkhorn as lightlys_sinkhorn
from torch import Tensor

from cosmos_ssl.api import Features, ImageGroup, LossOutput, Need, Progress, Spec, StepContext, Views, ViewSpec
from cosmos_ssl_plugins.losses.ibot import Ibot

SPEC = Spec(
    embed_dim=8,
    has_teacher=True,
    image_views={"global": ViewSpec(views=2, masks=True), "local": ViewSpec(views=3)},
    heads={
        "mine": {"global": 7, "local": 7, "global_masked": 7, "global_patches": 7},
        "masked": {"global_masked": 7},
        "plain": {"global": 7},
    },
)
TEMP = 1 / 16
"""Exact in float32: lightly holds its temperature so."""


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def draw_masks(seed: int = 0) -> Tensor:
    """[2, 5, 9]: 0, 1, 2, 4 or 8 patches of each image (lightly holds one over the count in float32, where these are
    exact).
    """
    draw = torch.Generator().manual_seed(seed)
    counts = torch.tensor([0, 1, 2, 4, 8]).repeat(2)[torch.randperm(10, generator=draw)].view(2, 5, 1)
    return torch.rand(2, 5, 9, generator=draw).argsort(-1) < counts


def run(loss: Ibot, student: Tensor, teacher: Tensor, masks: Tensor) -> LossOutput:
    group = ImageGroup(
        pixels=torch.empty(*masks.shape[:2], 3, 3, 3), params=torch.empty(*masks.shape[:2], 0), masks=masks
    )
    context = StepContext(
        views=Views(keys=[""] * masks.shape[1], image={"global": group}),
        student=Features(heads={"mine": {"global_masked": student}}),
        teacher=Features(heads={"mine": dict.fromkeys(("global_masked", "global_patches"), teacher.detach())}),
        gathered={},
        progress=Progress(step=0, total_steps=10),
        head=lambda *_: {},
    )
    return loss(context)  # type: ignore[no-any-return]


def make(**options: Any) -> Ibot:
    return Ibot(SPEC, **({"head": "mine", "warmup_teacher_temp_epochs": 0} | options)).double()


def test_equals_lightly_over_three_steps() -> None:
    """Loss, gradient and centre, float64, to 1e-12."""
    ours = make(teacher_temp=TEMP, center_momentum=0.8)
    theirs = IBOTPatchLoss(output_dim=7, teacher_temp=TEMP, student_temp=0.1, center_momentum=0.8).double()
    for step in range(3):
        masks = draw_masks(step)
        student, teacher = leaf(int(masks.sum()), 7, seed=step), leaf(int(masks.sum()), 7, seed=step + 10).detach()
        loss = run(ours, student, teacher, masks).terms["patches"]
        expected = theirs(teacher, student, masks.view(10, 3, 3))
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        gradients = [torch.autograd.grad(x, student)[0] for x in (loss, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)
        assert ours.targets.center is not None
        torch.testing.assert_close(ours.targets.center, theirs.center.value.view(7), rtol=1e-12, atol=1e-15)


def test_a_center_over_all_patches() -> None:
    """As over the masked ones, but the center moves by the mean of all patches."""
    ours, plain, before = make(center_over="all"), make(), torch.zeros(7, dtype=torch.float64)
    for step in range(3):
        masks = draw_masks(step)
        student, teacher = leaf(int(masks.sum()), 7, seed=step), leaf(2, 5, 9, 7, seed=step + 10)
        loss, expected = run(ours, student, teacher, masks), run(plain, student, teacher[masks], masks)
        torch.testing.assert_close(loss.terms["patches"], expected.terms["patches"], rtol=1e-12, atol=0)
        assert ours.targets.center is not None and plain.targets.center is not None
        moved = 0.1 * teacher.detach().mean((0, 1, 2)) + 0.9 * before
        torch.testing.assert_close(ours.targets.center, moved, rtol=1e-6, atol=1e-9)
        plain.targets.center.copy_(moved)
        before = moved
    assert [need.outputs for need in ours.requires()] == [("global_masked",), ("global_patches",)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"centering": "sinkhorn"}, "center_over: all needs centering: center, not sinkhorn"),
        ({"head": "masked"}, "center_over: all needs an output 'global_patches' of the head 'masked'"),
    ],
)
def test_a_center_over_all_patches_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(center_over="all", **options)


def test_a_group_of_another_name() -> None:
    groups = {"teacher": ViewSpec(views=2, masks=True)}
    loss = Ibot(Spec(embed_dim=8, image_views=groups, heads={"a": {"teacher_masked": 7}}), head="a", group="teacher")
    assert [(need.role, need.outputs) for need in loss.requires()] == [
        ("student", ("teacher_masked",)),
        ("teacher", ("teacher_masked",)),
    ]
    with pytest.raises(ValueError, match="head: no head 'mine' with an output 'teacher_masked'"):
        make(group="teacher")


@pytest.mark.parametrize("centering", ["center", "sinkhorn"])
def test_an_image_weighs_one_over_its_masked_patches(centering: str) -> None:
    """The formula of section 3.1, image by image."""
    masks = draw_masks()
    student, teacher = leaf(int(masks.sum()), 7), leaf(int(masks.sum()), 7, seed=1).detach()
    found = run(make(centering=centering, teacher_temp=TEMP), student, teacher, masks).terms["patches"]
    targets = (
        (teacher / TEMP).softmax(-1)
        if centering == "center"
        else lightlys_sinkhorn(teacher, iterations=3, epsilon=TEMP)
    )
    rows = -(targets * (student / 0.1).log_softmax(-1)).sum(-1)
    full = torch.zeros(2, 5, 9, dtype=torch.float64)
    full[masks] = rows
    images = [
        full[v, b][masks[v, b]].mean() if masks[v, b].any() else torch.zeros(()).double()
        for v in range(2)
        for b in range(5)
    ]
    torch.testing.assert_close(found, torch.stack(images).mean(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("centering", ["center", "sinkhorn"])
def test_no_masked_patches_at_all(centering: str) -> None:
    loss = make(centering=centering)
    before = [buffer.clone() for buffer in loss.buffers()]
    student = torch.empty(0, 7, dtype=torch.float64, requires_grad=True)
    output = run(loss, student, student, torch.zeros(2, 5, 9, dtype=torch.bool))
    output.terms["patches"].backward()
    assert output.terms["patches"] == 0 and student.grad is not None
    assert all(value.isfinite() for value in output.metrics.values())
    assert all(torch.equal(a, b) for a, b in zip(before, loss.buffers(), strict=True))


def test_metrics() -> None:
    masks = draw_masks()
    student = leaf(int(masks.sum()), 7)
    output = run(make(), student, torch.zeros_like(student), masks)
    assert output.metrics["masked"].item() == pytest.approx(masks.sum().item() / 90)
    assert output.metrics["teacher_entropy"].item() == pytest.approx(torch.tensor(7.0).log().item())
    assert output.metrics["teacher_temp"].item() == pytest.approx(0.07)


def test_requirements() -> None:
    assert make().requires() == [
        Need(head="mine", outputs=("global_masked",)),
        Need(role="teacher", head="mine", outputs=("global_masked",)),
    ]


def test_a_head_without_masked_patches_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"head: no head 'plain' with an output 'global_masked'\. Heads that have it: mine, masked$"
    ):
        Ibot(SPEC, head="plain")
    spec = Spec(embed_dim=8, image_views={"global": ViewSpec(views=2)}, heads={"mine": {"global": 7}})
    with pytest.raises(ValueError, match=r"No masks are drawn: set augmenters\.image\.mask_probability"):
        Ibot(spec, head="mine")
