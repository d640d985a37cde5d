"""The teachers: EMA against the plain rule, cosine momentum, and what never moves."""

import pytest
import torch
from torch import nn

from cosmos_ssl.api import Progress, Spec
from cosmos_ssl_plugins.teachers.ema import Ema
from cosmos_ssl_plugins.teachers.none import NoTeacher

SPEC = Spec(embed_dim=4)


def student():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def progress(step, total=10):
    return Progress(step=step, total_steps=total)


def test_starts_equal_and_moves_by_the_rule():
    model = student()
    teacher = Ema(SPEC, momentum_teacher=0.9)
    teacher.start(student, model)
    before = [p.clone() for p in teacher.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any(p.requires_grad for p in teacher.model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
        model[1].running_mean.fill_(3.0)
    assert teacher.update(model, progress(0)) == {"momentum": 0.9}
    for start, now, target in zip(before, teacher.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(now, 0.9 * start + 0.1 * target)
    assert torch.equal(teacher.model[1].running_mean, model[1].running_mean)


def test_cosine_momentum_goes_from_start_to_end():
    teacher = Ema(SPEC, momentum_teacher=0.99, final_momentum_teacher=1.0)
    assert teacher.momentum(progress(0)) == pytest.approx(0.99)
    assert teacher.momentum(progress(5)) == pytest.approx(0.995)
    assert teacher.momentum(progress(10)) == pytest.approx(1.0)
    assert Ema(SPEC, momentum_teacher=0.99).momentum(progress(7)) == pytest.approx(0.99)


def test_no_teacher_has_no_parameters():
    teacher = NoTeacher(SPEC)
    teacher.start(student, student())
    assert not NoTeacher.present
    assert not list(teacher.parameters())
    assert teacher.update(student(), progress(0)) == {}
