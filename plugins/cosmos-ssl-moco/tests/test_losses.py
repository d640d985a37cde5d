"""The losses against the published formulas, a query at a time; the queue over steps; what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cosmos_ssl_moco.losses import MocoText, MocoV3, Queue
from torch import Tensor
from torch.nn import functional as F

from cosmos_ssl.api import Loss, Spec, StepContext
from cosmos_ssl.testing import example_context, example_spec

HEADS = {"project": {"global": 16}, "predict": {"global": 16}, "narrow": {"global": 8}, "local": {"local": 16}}


def spec() -> Spec:
    return example_spec(heads=HEADS)


def made(cls: type[Loss], **options: Any) -> Loss:
    torch.manual_seed(0)
    return cls(spec(), **options)


def step(loss: Loss, seed: int) -> StepContext:
    return example_context(loss, spec(), seed=seed)


def cross_entropy(query: Tensor, keys: list[Tensor], own: int, temperature: Tensor | float) -> Tensor:
    """-log of the share that a query's own key has: exp of cosines over the temperature, written out."""
    logits = torch.stack([F.cosine_similarity(query, key, dim=0) for key in keys]) / temperature
    return -(logits[own].exp() / logits.exp().sum()).log()


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()


def assert_same(ours: Tensor, plain: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    found, expected = (torch.autograd.grad(x, leaves) for x in (ours, plain))
    for a, b in zip(found, expected, strict=True):
        assert b.any()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("texts", "images"), [(0, 0), (9, 0), (30, 50)])
def test_pictures_and_texts_by_the_formula(texts: int, images: int) -> None:
    """The second step, so that keys of the first are in the queues."""
    loss = made(MocoText, text_queue=texts, image_queue=images)
    loss(step(loss, 0))
    queues = {"text": list(loss.texts.keys.clone()), "image": list(loss.images.keys.clone())}
    ctx = step(loss, 7)
    student, teacher = ctx.student, ctx.teacher
    assert teacher is not None
    queries = {"text": student.image["global"].projected, "image": student.stack("text")}
    plain = torch.zeros(())
    for modality, queue in queues.items():
        keys = teacher.of(modality)["global"].projected  # type: ignore[arg-type]
        assert keys is not None
        found = [
            cross_entropy(query, [*view, *queue], m, 1 / loss.logit_scale.exp())
            for view in keys
            for own in queries[modality]
            for m, query in enumerate(own)
        ]
        plain = plain + mean(found) / 2
    leaves = [student.image["global"].projected, *(group.projected for group in student.text.values())]
    assert_same(sum(loss(ctx).terms.values()), plain, [*leaves, loss.logit_scale])


@pytest.mark.parametrize("queue", [0, 9, 50])
def test_moco_v3_by_the_formula(queue: int) -> None:
    loss = made(MocoV3, head="predict", target_head="project", queue_size=queue, temperature=0.3)
    loss(step(loss, 0))
    past, ctx = list(loss.queue.keys.clone()), step(loss, 7)
    queries, keys = ctx.student.heads["predict"]["global"], ctx.gathered["teacher"].heads["project"]["global"]
    plain = torch.zeros(())
    for v, u in ((0, 1), (1, 0)):  # ctr(q1, k2) + ctr(q2, k1) of the paper's algorithm 1
        plain = plain + 2 * 0.3 * mean([cross_entropy(q, [*keys[u], *past], m, 0.3) for m, q in enumerate(queries[v])])
    assert_same(loss(ctx).terms["pairs"], plain, [queries])


def test_a_queue_holds_the_newest_keys() -> None:
    """Against a list that loses its oldest, over steps of several sizes; what was taken stays as it was."""
    queue, plain = Queue(10, 4), list(Queue(10, 4).keys)
    plain = list(queue.keys.clone())
    assert torch.allclose(queue.keys.norm(dim=-1), torch.ones(10))
    taken, before = queue.take(), queue.keys.clone()
    for number, (views, samples) in enumerate([(1, 3), (2, 2), (1, 10), (2, 8), (1, 1)]):
        keys = F.normalize(torch.randn(views, samples, 4, generator=torch.Generator().manual_seed(number)), dim=-1)
        queue.put(keys)
        plain = [*plain, *keys.flatten(0, 1)][-10:]
        oldest_first = queue.keys.roll(-int(queue.place), 0)
        assert torch.equal(oldest_first, torch.stack(plain))
    assert taken is not None and torch.equal(taken, before)


def test_the_scale_stays_within_bounds() -> None:
    loss = made(MocoText, text_queue=4, image_queue=4)
    for start, end in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        loss.logit_scale.data.fill_(start)
        loss.after_step()
        assert float(loss.logit_scale.detach()) == pytest.approx(end)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (MocoText, {"init_logit_scale": 101.0}, r"init_logit_scale: 101 is outside"),
        (MocoV3, {"head": "pol", "target_head": "project"}, r"head: no head 'pol' with an output 'global'"),
        (MocoV3, {"head": "predict", "target_head": "local"}, r"target_head: no head 'local' with an output 'global'"),
        (MocoV3, {"head": "narrow", "target_head": "project"}, r"head: 'narrow' gives 8 numbers, and 'project' 16"),
    ],
)
def test_impossible_options_are_refused(cls: type[Loss], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(cls, **options)
