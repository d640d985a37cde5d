"""Block masks: shares, shapes and distribution, against lightly's generator; and as multi_crop draws them."""

from __future__ import annotations

import io
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from lightly.models.utils import random_block_mask_image
from numpy.typing import NDArray
from PIL import Image

from cosmos_ssl.api import Sample, Spec, TowerSpec, ViewSpec
from cosmos_ssl_plugins.augmenters.masks import BlockMasks, block_mask
from cosmos_ssl_plugins.augmenters.multi_crop import MultiCrop

ASPECT = (0.3, 1 / 0.3)
SPEC = Spec(embed_dim=8, image=TowerSpec(width=8, patch_size=4))


def drawn(count: int, grid: int = 14, repeat: int = 300) -> list[NDArray[np.bool_]]:
    rng = np.random.default_rng(0)
    return [block_mask(grid, count, ASPECT, rng) for _ in range(repeat)]


def border(masks: list[NDArray[np.bool_]]) -> float:
    """Mean number of neighbours of which one is masked."""
    return float(np.mean([(m[1:] != m[:-1]).sum() + (m[:, 1:] != m[:, :-1]).sum() for m in masks]))


def sample(width: int = 60, height: int = 40) -> Sample:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(stream, "PNG")
    return Sample(key="k", image=stream.getvalue())


def crops(**options: Any) -> MultiCrop:
    return MultiCrop(SPEC, **({"global_crops_size": 33, "local_crops_size": 16} | options))


@pytest.mark.parametrize("grid", [1, 2, 6, 14, 16])
def test_exactly_so_many_patches(grid: int) -> None:
    rng = np.random.default_rng(0)
    for count in range(grid**2 + 1):
        assert block_mask(grid, count, ASPECT, rng).sum() == count


@pytest.mark.parametrize("count", [20, 50, 98])
def test_blocks_are_those_of_lightly(count: int) -> None:
    """As long a border as lightly's own masks of as many patches (which follow DINOv2's code), far from scattered
    patches'.
    """
    ours = drawn(count)
    state = random.getstate()
    random.seed(0)
    lightlys = [random_block_mask_image((14, 14), count).numpy() for _ in range(300)]
    random.setstate(state)
    rng = np.random.default_rng(0)
    scattered = [rng.permutation(np.arange(196) < count).reshape(14, 14) for _ in range(300)]
    assert border(ours) == pytest.approx(border(lightlys), rel=0.08)
    assert border(ours) < 0.5 * border(scattered)
    # the middle is masked more often than the rim, to the same degree
    assert np.mean(ours, 0).std() == pytest.approx(np.mean(lightlys, 0).std(), rel=0.2)


@pytest.mark.parametrize(("aspect", "shape"), [(1.0, (2, 2)), (4.0, (4, 1)), (0.25, (1, 4))])
def test_few_patches_are_one_block_and_the_aspect_is_height_over_width(aspect: float, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = block_mask(14, 4, (aspect, aspect), rng)
        assert (mask.any(1).sum(), mask.any(0).sum()) == shape


@pytest.mark.parametrize("fill", [True, False])
@pytest.mark.parametrize("smallest", [1, 9, 16])
def test_the_smallest_block(smallest: int, fill: bool) -> None:
    """As many patches as a block has are one block, where its sides round to that area."""
    rng = np.random.default_rng(0)
    side = math.isqrt(smallest)
    for _ in range(50):
        mask = block_mask(14, smallest, (1.0, 1.0), rng, min_patches=smallest, fill=fill)
        assert (mask.any(1).sum(), mask.any(0).sum(), mask.sum()) == (side, side, smallest)


@pytest.mark.parametrize(("count", "smallest"), [(20, 16), (50, 16), (98, 4)])
def test_without_filling_masks_are_those_of_lightly(count: int, smallest: int) -> None:
    """As many patches as lightly's own masks hide (which follow DINOv2's code), often fewer than asked for."""
    rng = np.random.default_rng(0)
    ours = [block_mask(14, count, ASPECT, rng, min_patches=smallest, fill=False) for _ in range(1000)]
    state = random.getstate()
    random.seed(0)
    lightlys = [random_block_mask_image((14, 14), count, smallest).numpy() for _ in range(1000)]
    random.setstate(state)
    counts, expected = (np.array([mask.sum() for mask in masks]) for masks in (ours, lightlys))
    assert counts.max() == count and 0.05 < np.mean(counts < count) < 0.98
    assert np.mean(counts) == pytest.approx(np.mean(expected), rel=0.02)
    assert np.mean(counts < count) == pytest.approx(np.mean(expected < count), abs=0.06)
    assert np.mean(ours, 0).std() == pytest.approx(np.mean(lightlys, 0).std(), rel=0.2)
    assert border(ours) == pytest.approx(border(lightlys), rel=0.05)


def test_without_filling_blocks_are_smaller_than_the_view() -> None:
    rng = np.random.default_rng(0)
    whole, inner = ([block_mask(4, 12, (3.0, 3.0), rng, fill=fill) for _ in range(100)] for fill in (True, False))
    assert {int(mask.sum()) for mask in whole} == {12}
    # blocks of four rows are refused: what is left are those of a single column
    assert not any(block_mask(4, 4, (4.0, 4.0), rng, fill=False).any() for _ in range(100))
    assert all(mask.sum() <= 12 for mask in inner) and min(mask.sum() for mask in inner) < 12


def test_shares_are_uniform_and_views_are_masked_with_the_probability() -> None:
    masks = BlockMasks(grid=14, probability=0.5, ratio=(0.1, 0.5), aspect=ASPECT)(4000, np.random.default_rng(0))
    assert masks.dtype == torch.bool and masks.shape == (4000, 196)
    counts = masks.sum(1)
    hit = counts > 0
    assert hit.float().mean().item() == pytest.approx(0.5, abs=0.03)
    share = counts[hit] / 196
    assert share.min() >= 0.1 and share.max() <= 0.5
    assert (counts[hit].min().item(), counts[hit].max().item()) == (20, 98)  # ceil(19.6), floor(98.0)
    assert share.mean().item() == pytest.approx(59 / 196, abs=0.01)
    assert np.histogram(share, 4, (0.1, 0.5))[0].std() < 60  # of 500 in each quarter


def test_a_share_that_is_no_whole_number_of_patches() -> None:
    masks = BlockMasks(grid=3, probability=1.0, ratio=(0.5, 0.5), aspect=ASPECT)(20, np.random.default_rng(0))
    assert masks.sum(1).tolist() == [5] * 20


def test_multi_crop_masks_global_views_alone() -> None:
    augmenter = crops(mask_probability=1.0)
    assert augmenter.offers() == {"global": ViewSpec(views=2, size=33, masks=True), "local": ViewSpec(views=6, size=16)}
    found = augmenter.crop(sample(), np.random.default_rng(0))
    masks = found["global"].masks
    assert masks is not None and masks.shape == (2, 64)  # 33 pixels hold 8 whole patches of 4
    assert not torch.equal(masks[0], masks[1])
    assert found["local"].masks is None


def test_multi_crop_hands_on_the_options_of_blocks() -> None:
    options = {"mask_probability": 1.0, "mask_ratio": (0.25, 0.25), "mask_aspect": (1.0, 1.0)}
    square = crops(**options, mask_min_patches=16).crop(sample(), np.random.default_rng(0))["global"].masks
    assert square is not None and all(m.view(8, 8).any(side).sum() == 4 for m in square for side in (0, 1))
    partial = crops(**options, mask_fill=False, mask_min_patches=9)
    masks = [partial.crop(sample(), np.random.default_rng(seed))["global"].masks for seed in range(20)]
    counts = torch.stack([m for m in masks if m is not None]).sum(-1)
    assert counts.min() < 16 and counts.max() == 16


def test_same_generator_same_masks() -> None:
    augmenter = crops(mask_probability=0.5)
    first, again, other = (augmenter.crop(sample(), np.random.default_rng(seed))["global"].masks for seed in (3, 3, 4))
    assert first is not None and again is not None and other is not None
    assert torch.equal(first, again) and not torch.equal(first, other)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    elsewhere = augmenter.crop(sample(), np.random.default_rng(3))["global"].masks
    assert elsewhere is not None and torch.equal(first, elsewhere)


def test_masks_change_no_view_and_none_are_drawn_when_off() -> None:
    off_rng, expected = np.random.default_rng(5), np.random.default_rng(5)
    off = crops().crop(sample(), off_rng)
    on = crops(mask_probability=1.0).crop(sample(), np.random.default_rng(5))
    for name in ("global", "local"):
        assert torch.equal(off[name].pixels, on[name].pixels) and torch.equal(off[name].params, on[name].params)
        assert off[name].masks is None and not crops().offers()[name].masks
    expected.random(
        (8, 40 + 14)
    )  # 8 views, 40 numbers for a box and 14 for its colours: as many as before there were masks
    assert off_rng.bit_generator.state == expected.bit_generator.state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_probability": 1.5}, "mask_probability: 1.5"),
        ({"mask_probability": -0.5}, "mask_probability: -0.5"),
        ({"mask_probability": 0.5, "mask_ratio": (0.5, 0.1)}, "mask_ratio"),
        ({"mask_probability": 0.5, "mask_ratio": (0.0, 0.1)}, "mask_ratio"),
        ({"mask_probability": 0.5, "mask_aspect": (0.0, 1.0)}, "mask_aspect"),
        ({"mask_probability": 0.5, "mask_min_patches": 0}, "mask_min_patches: 0 is less than 1"),
        (
            {"mask_probability": 0.5, "mask_min_patches": 65, "mask_fill": False},
            "mask_min_patches: 65 is more than the 64 patches of a view",
        ),
        ({"mask_probability": 0.5, "global_crops_size": 3}, "mask_probability: .* no patches"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        crops(**options)


def test_a_tower_without_patches_is_refused() -> None:
    with pytest.raises(ValueError, match="mask_probability: the image tower has no patches"):
        MultiCrop(Spec(embed_dim=8, image=TowerSpec(width=8)), mask_probability=0.5)
