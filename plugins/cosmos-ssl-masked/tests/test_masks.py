"""Masks are those of the papers: how many patches, which blocks, and a context that shares none with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cosmos_ssl_masked.masks import MaskedCrop, MultiBlock, RandomMasks, target_masks

from cosmos_ssl.api import ImageCrops, ImageGroup, Spec, TowerSpec
from cosmos_ssl.testing import check_augmenter, example_samples, example_spec

SPEC = Spec(embed_dim=8, image=TowerSpec(width=8, image_size=224, patch_size=16))
GRID = 14
WIDE, TALL, TINY, _ = example_samples()


def drawn(augmenter: MaskedCrop, seed: int) -> ImageCrops:
    crops = augmenter.crop(WIDE, np.random.default_rng(seed))["global"]
    assert isinstance(crops, ImageCrops)
    return crops


@pytest.mark.parametrize(("ratio", "hidden"), [(0.75, 147), (0.6, 118), (0.5, 98)])
def test_random_masks_hide_the_same_number_everywhere(ratio: float, hidden: int) -> None:
    """147 of 196 patches at 75 %, as in the paper; each patch as often as any other."""
    augmenter = RandomMasks(SPEC, mask_ratio=ratio)
    masks = torch.stack([torch.from_numpy(augmenter.hide(np.random.default_rng(seed))[0]) for seed in range(400)])
    assert masks.shape == (400, GRID**2) and (masks.sum(1) == hidden).all()
    spread = (ratio * (1 - ratio) / 400) ** 0.5
    assert (masks.float().mean(0) - ratio).abs().max() < 5 * spread


def test_blocks_are_of_the_sizes_asked_for_and_apart_from_the_context() -> None:
    augmenter = MultiBlock(SPEC)
    areas, contexts = [], []
    for seed in range(200):
        crops = drawn(augmenter, seed)
        group = ImageGroup(pixels=crops.pixels[:, None], params=crops.params[:, None], masks=crops.masks[:, None])  # type: ignore[index]
        targets = target_masks(group, 4)
        assert targets.shape == (4, 1, 1, GRID**2)
        boxes = crops.params[0, 1:].view(4, 4).int().tolist()
        for block, (top, left, height, width) in zip(targets, boxes, strict=True):
            plain = torch.zeros(GRID, GRID, dtype=torch.bool)
            for row in range(top, top + height):
                for column in range(left, left + width):
                    plain[row, column] = True
            assert torch.equal(block.view(GRID, GRID), plain)
            # sides are rounded, by half a patch at most, from those of areas and aspects within the ranges
            assert (0.15 * GRID**2 * 0.75) ** 0.5 - 0.5 <= height <= (0.2 * GRID**2 * 1.5) ** 0.5 + 0.5
            assert (0.15 * GRID**2 / 1.5) ** 0.5 - 0.5 <= width <= (0.2 * GRID**2 / 0.75) ** 0.5 + 0.5
            areas.append(height * width)
        context = ~group.masks[0, 0]  # type: ignore[index]
        assert context.any() and not (context & targets.any(0)[0, 0]).any()
        contexts.append(int(context.sum()))
    assert np.mean(areas) == pytest.approx(0.175 * GRID**2, rel=0.03)
    assert 0.25 * GRID**2 < np.mean(contexts) < 0.6 * GRID**2


def test_without_blocks_all_that_is_hidden_is_to_be_predicted() -> None:
    crops = drawn(RandomMasks(SPEC), 0)
    group = ImageGroup(pixels=crops.pixels[:, None], params=crops.params[:, None], masks=crops.masks[:, None])  # type: ignore[index]
    assert torch.equal(target_masks(group, 0)[0], group.masks)  # type: ignore[arg-type]


def test_a_context_without_a_patch_is_drawn_anew() -> None:
    """Four blocks of a quarter each often hide all 16 patches; ten draws in a row do so next to never."""
    spec = Spec(embed_dim=8, image=TowerSpec(width=8, image_size=32, patch_size=8))
    augmenter = MultiBlock(spec, size=32, target_scale=(0.25, 0.25), target_aspect=(1.0, 1.0), blocks=6)
    once = [augmenter.hide(np.random.default_rng(seed))[0] for seed in range(100)]
    assert not any(hidden.all() for hidden in once)


def test_the_least_context() -> None:
    """Four targets often leave less than 80 patches of the context; with ten draws they do so next to never."""
    least = [
        min(int((~MultiBlock(SPEC, min_context=n).hide(np.random.default_rng(seed))[0]).sum()) for seed in range(100))
        for n in (1, 80)
    ]
    assert least[0] < 80 <= least[1]


def test_blocks_of_the_program_of_ijepa() -> None:
    """One number sets area and aspect, and sides stay below the grid's."""
    wide = {"target_scale": (0.1, 0.9), "target_aspect": (0.5, 2.0)}
    joint, free = (MultiBlock(SPEC, joint_aspect=joint, inside=joint, **wide) for joint in (True, False))
    boxes, others = (
        np.array([a._block(a.target, a.aspect, rng)[2:] for _ in range(300)])
        for a, rng in ((joint, np.random.default_rng(0)), (free, np.random.default_rng(0)))
    )
    u = np.linspace(0, 1, 100_001)
    area, aspect = GRID**2 * (0.1 + 0.8 * u), 0.5 + 1.5 * u
    sides = np.stack([np.sqrt(area * aspect), np.sqrt(area / aspect)], 1).round().clip(1, GRID - 1)
    assert {*map(tuple, boxes)} <= {*map(tuple, sides)} and boxes.max() == GRID - 1
    assert not {*map(tuple, others)} <= {*map(tuple, sides)} and others.max() == GRID


def test_views_keep_to_the_contract() -> None:
    around: dict[str, Any] = {"heads": {"cross": None}}
    check_augmenter("random_masks", around=around, size=32)
    check_augmenter("multi_block", around=around, size=32, blocks=2, flip_prob=1.0)
    mirrored, plain = (RandomMasks(SPEC, flip_prob=p) for p in (1.0, 0.0))
    views = [augmenter.crop(TALL, np.random.default_rng(3))["global"] for augmenter in (mirrored, plain)]
    groups = [ImageGroup(pixels=x.pixels[:, None], params=x.params[:, None]) for x in views]
    first, second = (a.finish(g).pixels for a, g in zip((mirrored, plain), groups, strict=True))  # type: ignore[arg-type]
    torch.testing.assert_close(first.flip(-1), second, rtol=0, atol=0)
    assert plain.crop(TINY, np.random.default_rng(0))["global"].pixels.shape == (1, 3, 224, 224)


@pytest.mark.parametrize(
    ("augmenter", "options", "message"),
    [
        (RandomMasks, {"mask_ratio": 1.0}, "mask_ratio: 1 hides none or all of 196 patches"),
        (RandomMasks, {"mask_ratio": 0.0}, "mask_ratio: 0 hides none"),
        (RandomMasks, {"size": 8}, "size: views of 8 pixels hold no patch"),
        (MultiBlock, {"scale": (0.5, 0.3)}, "scale: "),
        (MultiBlock, {"target_scale": (0.0, 0.2)}, "target_scale: "),
        (MultiBlock, {"context_scale": (0.8, 1.1)}, "context_scale: "),
        (MultiBlock, {"target_aspect": (2.0, 1.0)}, "target_aspect: "),
        (MultiBlock, {"min_context": 197}, "min_context: 197 is not between 1 and the 196 patches"),
        (MultiBlock, {"size": 16, "inside": True}, "inside: no block is smaller than a view of one patch"),
    ],
)
def test_impossible_options_are_refused(augmenter: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        augmenter(SPEC, **options)
    with pytest.raises(ValueError, match="hold no patch"):
        augmenter(example_spec(image=None))
