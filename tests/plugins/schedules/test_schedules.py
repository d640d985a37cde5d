"""The values of schedules, against their formulas, and the numbers of parts that follow them."""

import math

import pytest

from cosmos_ssl.api import Curve, Progress, Spec, value_at
from cosmos_ssl_plugins.losses.targets import TeacherTargets
from cosmos_ssl_plugins.schedules.stages import Constant, Step, WarmupStableDecay
from cosmos_ssl_plugins.schedules.ways import Cosine, Linear
from cosmos_ssl_plugins.teachers.ema import Ema

SPEC = Spec(embed_dim=4)


def left(schedule, steps, total=100, begin=0):
    return [schedule.left(Progress(step=step, total_steps=total, steps_per_epoch=10), begin) for step in steps]


def test_values():
    assert left(Cosine(SPEC), (10, 40, 70), begin=10) == pytest.approx([1, 0.75, 0.25], abs=1e-12)
    assert left(Linear(SPEC), (10, 40, 70), begin=10) == pytest.approx([1, 2 / 3, 1 / 3])
    assert left(Linear(SPEC, over_epochs=2.5), (5, 10, 29, 30, 99), begin=5) == pytest.approx([1, 0.8, 0.04, 0, 0])
    assert left(Cosine(SPEC, over_steps=20), (5, 10, 20)) == pytest.approx([(1 + math.cos(math.pi / 4)) / 2, 0.5, 0])
    assert left(Constant(SPEC), (0, 99)) == [1, 1]
    assert left(Step(SPEC, at=[30, 60], factor=0.5), (29, 30, 59, 60)) == [1, 0.5, 0.5, 0.25]
    decaying = [1 - math.sqrt(done / 21) for done in (1, 11, 20)]
    assert left(WarmupStableDecay(SPEC), (0, 79, 80, 90, 99)) == pytest.approx([1, 1, *decaying])
    tenth = WarmupStableDecay(SPEC, decay_share=0.1, decay="linear")
    assert left(tenth, (89, 90, 94)) == pytest.approx([1, 10 / 11, 6 / 11])
    assert left(WarmupStableDecay(SPEC, decay_steps=4, decay="linear"), (95, 96, 99)) == pytest.approx([1, 0.8, 0.2])
    assert left(WarmupStableDecay(SPEC, decay="at_once"), (0, 79, 80, 99)) == [1, 1, 0, 0]


def test_what_is_stable():
    lengths = [
        schedule.stable_steps(50, 5)
        for schedule in (Cosine(SPEC), Cosine(SPEC, over_steps=7), Constant(SPEC), Step(SPEC, at=[3]))
    ]
    assert lengths == [0, 50, 50, 50]
    assert [WarmupStableDecay(SPEC).stable_steps(total, 5) for total in (3, 6, 10, 100)] == [3, 5, 8, 80]


def test_parts_follow_a_curve():
    curve = Curve(type="linear", start=0.5, end=1.0).follow(Linear(SPEC, over_steps=10))
    middle, last = (Progress(step=step, total_steps=40) for step in (5, 30))
    teacher = Ema(SPEC, momentum_teacher=curve)
    assert [teacher.momentum(progress) for progress in (middle, last)] == [0.75, 1.0]
    assert value_at(0.3, middle) == 0.3
    with pytest.raises(ValueError, match="final_momentum_teacher: momentum_teacher has an end already"):
        Ema(SPEC, momentum_teacher=curve, final_momentum_teacher=1.0)
    options = {"centering": "center", "center_momentum": 0.9, "sinkhorn_iterations": 3}
    warm = {"warmup_teacher_temp": 0.04, "warmup_teacher_temp_epochs": 30}
    targets = TeacherTargets(4, teacher_temp=curve, **warm, **options)
    assert targets.temperature(middle) == 0.75
