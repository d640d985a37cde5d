"""KoLeo against lightly's loss and the formula of the estimator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightly.loss import KoLeoLoss
from torch import Tensor
from torch.nn import functional as F

from cosmos_ssl.api import Features, GroupFeatures, LossOutput, Need, Progress, Spec, StepContext, Views
from cosmos_ssl_plugins.losses.koleo import Koleo

SPEC = Spec(embed_dim=8, batch_size=6)


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def run(loss: Koleo, x: Tensor, kind: str = "pooled") -> LossOutput:
    group = GroupFeatures(views=tuple(range(len(x))), **{"pooled": x, kind: x})  # type: ignore[arg-type]
    features = Features(image={"global": group})
    context = StepContext(
        views=Views(keys=[""] * x.shape[1]),
        student=features,
        teacher=None,
        gathered={"student": features},
        progress=Progress(step=0, total_steps=10),
        head=lambda *_: {},
    )
    return loss(context)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["pooled", "projected"])
def test_equals_lightly_summed_over_views(kind: Any) -> None:
    """Loss and gradient, float64, to 1e-12; DINOv2 sums over the two global views."""
    x = leaf(2, 6, 5)
    theirs = KoLeoLoss()
    loss, expected = (
        run(Koleo(SPEC, kind=kind), x, kind).terms["koleo"],
        torch.stack([theirs(view) for view in x]).sum(),
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(value, x)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


def test_equals_the_formula() -> None:
    x = leaf(1, 6, 5)
    unit = F.normalize(x[0], dim=-1)
    nearest = [min((unit[i] - unit[j]).norm().item() for j in range(6) if j != i) for i in range(6)]
    output = run(Koleo(SPEC), x)
    assert output.terms["koleo"].item() == pytest.approx(-torch.tensor(nearest).log().mean().item(), rel=1e-6)
    assert output.metrics["distance"].item() == pytest.approx(sum(nearest) / 6, rel=1e-6)


def test_neighbours_of_this_rank() -> None:
    """On one rank both scopes are the same; features of all ranks are not asked for."""
    x = leaf(2, 6, 5)
    assert torch.equal(*(run(Koleo(SPEC, scope=scope), x).terms["koleo"] for scope in ("all_ranks", "rank")))
    assert Koleo(SPEC, scope="rank").requires() == [Need(modality="image", group="global", kind="pooled")]


def test_equal_features_give_finite_values_and_gradients() -> None:
    x = torch.ones(1, 4, 5, requires_grad=True)
    loss = run(Koleo(SPEC), x).terms["koleo"]
    loss.backward()
    assert loss.isfinite() and x.grad is not None and x.grad.isfinite().all()


def test_requirements() -> None:
    assert Koleo(SPEC).requires() == [Need(modality="image", group="global", kind="pooled", gathered=True)]


def test_impossible_options_are_named() -> None:
    with pytest.raises(ValueError, match="eps: 0"):
        Koleo(SPEC, eps=0)
    with pytest.raises(ValueError, match="batch_size must be at least 2"):
        Koleo(Spec(embed_dim=8, batch_size=1))
