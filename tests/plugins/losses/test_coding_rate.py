"""SimDINO's loss against its formula, pair by pair and view by view, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cosmos_ssl.api import (
    Features,
    GroupFeatures,
    ImageGroup,
    LossOutput,
    Need,
    Progress,
    Spec,
    StepContext,
    TowerSpec,
    Views,
    ViewSpec,
)
from cosmos_ssl_plugins.losses import coding_rate as module
from cosmos_ssl_plugins.losses.coding_rate import CodingRate, coding_rate

SPEC = Spec(
    embed_dim=8,
    batch_size=5,
    has_teacher=True,
    image=TowerSpec(width=7),
    image_views={"global": ViewSpec(views=2, masks=True), "local": ViewSpec(views=3)},
    heads={"mine": {"global": 7, "local": 7, "global_masked": 7}, "bare": {"global": 7}, "other": {"image": 7}},
)
MASKS = torch.arange(9) < torch.tensor([[0, 1, 9, 3, 2], [4, 4, 0, 1, 5]])[..., None]
HIDDEN = int(MASKS.sum())


def leaf(*shape: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()


def features(seed: int) -> dict[str, Tensor]:
    return {
        "global": leaf(2, 5, 7, seed=seed),
        "local": leaf(3, 5, 7, seed=seed + 1),
        "global_masked": leaf(HIDDEN, 7, seed=seed + 2),
    }


def run(loss: CodingRate, student: dict[str, Tensor], teacher: dict[str, Tensor], masks: Tensor = MASKS) -> LossOutput:
    """One step of features that are a head's and the tower's own at once."""
    group = ImageGroup(pixels=torch.empty(2, 5, 3, 3, 3), params=torch.empty(2, 5, 0), masks=masks)

    def role(x: dict[str, Tensor]) -> Features:
        whole = GroupFeatures(views=(0, 1), pooled=x["global"], masked_tokens=x["global_masked"])
        image = {"global": whole, "local": GroupFeatures(views=(0, 1, 2), pooled=x["local"])}
        return Features(image=image, heads={"mine": x, "bare": {"global": x["global"]}})

    context = StepContext(
        views=Views(keys=[""] * 5, image={"global": group}),
        student=role(student),
        teacher=role({name: x.detach() for name, x in teacher.items()}),
        gathered={},
        progress=Progress(step=0, total_steps=10),
        head=lambda *_: {},
    )
    return loss(context)  # type: ignore[no-any-return]


def formula(
    student: dict[str, Tensor], teacher: dict[str, Tensor], eps: float, gamma: float, share: float = 0
) -> dict[str, Tensor]:
    """Section 3 of the paper: d(x, y) = ||x - y||^2 / 2 of unit vectors, R(C) = log det(I + D / eps^2 C) / 2."""
    x, y = ({name: z / z.norm(dim=-1, keepdim=True) for name, z in role.items()} for role in (student, teacher))
    views = [*x["global"], *x["local"]]
    pairs = [
        (views[s] - y["global"][t]).square().sum(-1).mean() / 2 for t in range(2) for s in range(len(views)) if s != t
    ]
    expanded = (1 - share) * x["global"] + share * y["global"].detach()
    rates = [torch.logdet(torch.eye(7).double() + 7 / eps**2 * (z.T @ z) / 5) / 2 for z in expanded]
    full = torch.zeros(2, 5, 9, dtype=torch.float64)
    full[MASKS] = (x["global_masked"] - y["global_masked"]).square().sum(-1) / 2
    patches = [full[v, b].sum() / max(1, int(MASKS[v, b].sum())) for v in range(2) for b in range(5)]
    return {
        "distance": torch.stack(pairs).mean(),
        "rate": -gamma * torch.stack(rates).mean(),
        "patches": torch.stack(patches).mean(),
    }


@pytest.mark.parametrize("head", [None, "mine"])
@pytest.mark.parametrize(
    ("options", "eps", "share"), [({}, 0.5, 0), ({"gamma": 0.3, "features": "mean", "scope": "rank"}, 0.2, 0.5)]
)
def test_equals_the_formula(head: str | None, options: dict[str, Any], eps: float, share: float) -> None:
    """Terms and the gradient of each, float64, to 1e-10; one rank is all ranks."""
    student, teacher = features(0), features(10)
    found = run(CodingRate(SPEC, head=head, eps=eps, **options), student, teacher)
    expected = formula(student, teacher, eps, options.get("gamma", eps * math.sqrt(5 / (7 * 5))), share)
    assert list(found.terms) == list(expected)
    for name, term in found.terms.items():
        torch.testing.assert_close(term, expected[name], rtol=1e-10, atol=0)
        gradients = [
            torch.autograd.grad(x, list(student.values()), retain_graph=True, materialize_grads=True)
            for x in (term, expected[name])
        ]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    assert found.metrics["masked"].item() == pytest.approx(HIDDEN / 90)


def test_a_collapse_costs_and_a_spread_does_not() -> None:
    """All features alike have rank one, R = ln(1 + D / eps^2) / 2; an orthonormal basis the most that there is."""
    alike, basis = torch.ones(2, 5, 7).double(), torch.eye(7).double()[:5].expand(2, 5, 7)
    for x, rate in ((alike, math.log(1 + 7 / 0.25) / 2), (basis, 5 * math.log(1 + 7 / 0.25 / 5) / 2)):
        found = run(CodingRate(SPEC, head="bare"), {**features(0), "global": x}, features(10))
        assert found.metrics["coding_rate"].item() == pytest.approx(rate, rel=1e-6)


def test_the_rate_of_one_rank_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own samples, divided by the number of all."""
    monkeypatch.setattr(module, "world_size", lambda: 2)
    z = leaf(1, 5, 7, seed=0)
    expected = torch.logdet(torch.eye(7).double() + 3 * z[0].T @ z[0] / 10)[None] / 2
    found = coding_rate(z, 3, "rank")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), z)[0] for x in (found, expected)), rtol=1e-9, atol=1e-12)


def test_features_that_are_not_numbers_give_no_numbers() -> None:
    """The engine passes such a step over."""
    broken = {**features(0), "global": torch.full((2, 5, 7), torch.nan).double()}
    assert run(CodingRate(SPEC, head="mine"), broken, features(10)).terms["rate"].isnan()


def test_requirements() -> None:
    def own(group: str, kind: Any, role: Any = "student") -> Need:
        return Need(modality="image", group=group, kind=kind, role=role)

    shown = [own("global", "pooled", "teacher"), own("global", "masked_tokens", "teacher")]
    student = [own("global", "pooled"), own("local", "pooled"), own("global", "masked_tokens")]
    assert CodingRate(SPEC).requires() == [*student, *shown]
    assert CodingRate(SPEC, head="bare").requires() == [
        Need(head="bare", outputs=("global",)),
        Need(role="teacher", head="bare", outputs=("global",)),
    ]


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (SPEC, {"head": "other"}, "head: no head 'other' with an output 'global'. Heads that have it: mine, bare"),
        (Spec(embed_dim=8), {}, "needs model.image, and views 'global'"),
        (
            Spec(embed_dim=8, image=TowerSpec(width=7), image_views={"global": ViewSpec(views=1)}),
            {},
            "needs two views of a picture",
        ),
    ],
)
def test_what_cannot_be_is_named(spec: Spec, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodingRate(spec, **options)
