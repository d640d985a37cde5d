"""Head and losses against the papers' formulas, a picture and a block at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cosmos_ssl_masked.losses import Ijepa, Mae
from cosmos_ssl_masked.masks import BlockViews
from cosmos_ssl_masked.predictor import PatchPredictor
from torch import Tensor
from torch.nn import functional as F

from cosmos_ssl.api import Features, Spec, StepContext, Views, ViewSpec
from cosmos_ssl.functional import sincos_positions
from cosmos_ssl.testing import check_head, check_loss, example_context, example_features, example_spec, example_views

BOXES = [[[1, 0, 2, 2], [0, 1, 1, 3]], [[0, 0, 2, 1], [2, 2, 2, 2]], [[3, 3, 1, 1], [0, 0, 3, 1]]]
"""Of three pictures two target blocks each on a grid of 4 x 4; one view."""
SMALL: dict[str, Any] = {"width": 8, "layers": 2, "num_heads": 2}
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def the_spec(width: int = 0, *, blocks: bool = False) -> Spec:
    view = ViewSpec(views=1, size=32, masks=True)
    if blocks:
        view = BlockViews(views=1, size=32, masks=True, blocks=2)
    return example_spec(image_views={"global": view}, heads={"p": {"tokens": width, "targets": 1}})


def the_views(blocks: bool) -> Views:
    """A view of three pictures whose context is not all that the blocks leave."""
    views = example_views(the_spec(), samples=3)
    group = views.image["global"]
    masks = torch.zeros(1, 3, 4, 4, dtype=torch.bool)
    for sample, boxes in enumerate(BOXES):
        masks[0, sample, 3, :2] = True
        for top, left, height, width in boxes:
            masks[0, sample, top : top + height, left : left + width] = True
    params = torch.tensor([[[0.0, *boxes[0], *boxes[1]] for boxes in BOXES]])
    group = replace(group, masks=masks.flatten(2), params=params if blocks else params[..., :1])
    return replace(views, image={"global": group}, text={})


def places(views: Views, sample: int, blocks: bool) -> list[list[int]]:
    """The patches to predict of a picture, by block."""
    masks = views.image["global"].masks
    assert masks is not None
    if not blocks:
        return [masks[0, sample].nonzero().flatten().tolist()]
    return [[4 * y + x for y in range(t, t + h) for x in range(s, s + w)] for t, s, h, w in BOXES[sample]]


def gradients(value: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(value, inputs))


@pytest.mark.parametrize("blocks", [True, False])
def test_each_block_is_predicted_from_the_context_alone(blocks: bool) -> None:
    """The transformer on nothing but the tower's pooled feature, the context and the mask tokens of one block."""
    torch.manual_seed(0)
    views = the_views(blocks)
    head = PatchPredictor(the_spec(blocks=blocks), **SMALL)
    features = example_features(head.requires(("tokens",)), the_spec(), views=views)
    seen = features.of("image", hidden="drop")["global"]
    masks = views.image["global"].masks
    assert seen.tokens is not None and seen.pooled is not None and masks is not None
    found = head(features, views, ("tokens", "targets"))
    assert found["tokens"].shape == (2 if blocks else 1, 3, 16, 32)

    told = sincos_positions(16, 8)
    ours, plain = [], []
    for sample in range(3):
        for block, wanted in enumerate(places(views, sample, blocks)):
            assert found["targets"][block, sample, :, 0].nonzero().flatten().tolist() == sorted(wanted)
            context = (~masks[0, sample]).nonzero().flatten().tolist()
            x = torch.cat(
                [
                    head.embed(seen.pooled[0, sample])[None],
                    head.embed(seen.tokens[0, sample, context]) + told[context],
                    head.mask_token + told[wanted],
                ]
            )[None]
            for layer in head.layers:
                x = layer(x)
            plain.append(head.predict(head.norm(x[0, 1 + len(context) :])))
            ours.append(found["tokens"][block, sample, wanted])
    inputs = [seen.tokens, seen.pooled, *head.parameters()]
    a, b = torch.cat(ours), torch.cat(plain)
    torch.testing.assert_close(a, b, **CLOSE)
    weights = torch.randn(a.shape)
    for x, y in zip(gradients((a * weights).sum(), inputs), gradients((b * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def context_of(loss: Ijepa | Mae, views: Views, blocks: bool, width: int) -> tuple[StepContext, Tensor]:
    """What the loss reads, and the predictions in it, which take gradients."""
    head = PatchPredictor(the_spec(blocks=blocks), **SMALL)
    made = torch.randn(2 if blocks else 1, 3, 16, width).requires_grad_()
    outputs = {"tokens": made, **head(Features(), views, ("targets",))}
    context = example_context(loss, the_spec(width), views=views)
    return replace(context, student=replace(context.student, heads={"p": outputs})), made


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("distance", ["l2", "smooth_l1"])
def test_ijepa_is_its_formula(distance: Any, blocks: bool) -> None:
    torch.manual_seed(0)
    views, loss = the_views(blocks), Ijepa(the_spec(32), head="p", distance=distance)
    context, made = context_of(loss, views, blocks, 32)
    assert context.teacher is not None
    teacher = context.teacher.image["global"].tokens
    assert teacher is not None
    total, number = torch.zeros(()), 0
    for sample in range(3):
        for block, wanted in enumerate(places(views, sample, blocks)):
            terms = []
            for place in wanted:
                y = teacher[0, sample, place]
                y = (y - y.mean()) / (y.var(correction=0) + 1e-5).sqrt()
                apart = (made[block, sample, place] - y).abs()
                each = apart**2 if distance == "l2" else torch.where(apart < 1, apart**2 / 2, apart - 0.5)
                terms.append(each.mean())
            total, number = total + torch.stack(terms).mean(), number + 1
    value = loss(context).terms["distance"]
    torch.testing.assert_close(value, total / number, **CLOSE)
    torch.testing.assert_close(*gradients(value, [made]), *gradients(total / number, [made]), **CLOSE)


@pytest.mark.parametrize("normalised", [True, False])
def test_mae_is_its_formula(normalised: bool) -> None:
    torch.manual_seed(0)
    views, width = the_views(blocks=False), 3 * 8 * 8
    loss = Mae(the_spec(width), head="p", normalise_patches=normalised)
    context, made = context_of(loss, views, False, width)
    total = torch.zeros(())
    for sample in range(3):
        terms = []
        for place in places(views, sample, blocks=False)[0]:
            top, left = 8 * (place // 4), 8 * (place % 4)
            y = views.image["global"].pixels[0, sample, :, top : top + 8, left : left + 8].flatten()
            if normalised:
                y = (y - y.mean()) / (y.var() + 1e-6).sqrt()
            terms.append(F.mse_loss(made[0, sample, place], y))
        total = total + torch.stack(terms).mean() / 3
    value = loss(context).terms["error"]
    torch.testing.assert_close(value, total, **CLOSE)
    torch.testing.assert_close(*gradients(value, [made]), *gradients(total, [made]), **CLOSE)


def test_places_are_told_by_sines_and_cosines() -> None:
    told = sincos_positions(9, 8).view(3, 3, 2, 2, 2)  # row, column, axis, sine or cosine, rate
    for y in range(3):
        for x in range(3):
            for axis, place in enumerate((y, x)):
                angles = place * torch.tensor([1.0, 0.01])
                torch.testing.assert_close(told[y, x, axis], torch.stack([angles.sin(), angles.cos()]))


def test_parts_keep_to_the_contract() -> None:
    """On several views whose pictures hide other numbers of patches, some of them none; on two ranks as on one."""
    blocks = {"augmenters": {"image": {"type": "multi_block", "size": 32}}, "heads": {"cross": None}}
    for predicts, loss, around in (("features", "ijepa", blocks), ("pixels", "mae", {"heads": {}})):
        options = {"predicts": predicts, **SMALL}
        check_head("patch_predictor", around=around, **options)
        read = {**around, "heads": {**around["heads"], "p": {"type": "patch_predictor", **options}}}
        check_loss(loss, around=read, head="p", ranks=2)


def test_impossible_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"needs model\.image"):
        PatchPredictor(example_spec(image=None))
    with pytest.raises(ValueError, match="width: 30 is not a multiple"):
        PatchPredictor(example_spec(), width=30, num_heads=3)
    for loss, width in ((Ijepa, 3 * 8 * 8), (Mae, 32)):
        with pytest.raises(ValueError, match="head: no head 'p' of type patch_predictor with predicts: "):
            loss(the_spec(width), head="p")
        with pytest.raises(ValueError, match="head: no head 'cross'"):
            loss(example_spec(), head="cross")
