"""Each photometric operation against torchvision or PIL; chains, rows drawn, and independence of the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from cosmos_ssl_plugins.augmenters import photometric as ph

PUBLISHED = ph.Strengths(
    flip=0.5,
    jitter=0.8,
    factors=(0.4, 0.4, 0.2, 0.1),
    grey=0.2,
    blur=0.5,
    blur_radius=(0.1, 2.0),
    solarize=0.2,
    solarize_threshold=128,
)


@pytest.fixture(scope="module")
def views() -> Tensor:
    """Smooth colours, noise, greys, and the darkest and brightest values: uint8 [5, 3, 48, 40]."""
    generator = torch.Generator().manual_seed(0)
    rough = torch.randint(0, 256, (2, 3, 6, 5), generator=generator).float()
    smooth = torch.nn.functional.interpolate(rough, size=(48, 40), mode="bicubic").clamp(0, 255).to(torch.uint8)
    noise = torch.randint(0, 256, (2, 3, 48, 40), generator=generator, dtype=torch.uint8)
    noise[1] = torch.where(noise[1] > 127, 255, 0)
    return torch.cat([smooth, noise, smooth[:1, :1].expand(1, 3, 48, 40)])


def rows(count: int, **columns: float) -> NDArray[np.float32]:
    """Rows that change nothing, but for the named columns."""
    table = np.zeros((count, ph.COLUMNS), dtype=np.float32)
    table[:, ph.SOLARIZE] = 256
    for name, value in columns.items():
        table[:, getattr(ph, name)] = value
    return table


def jitter_rows(count: int, operation: int, factor: float) -> NDArray[np.float32]:
    """Rows of one jitter operation alone (the other three turns name none)."""
    table = rows(count, JITTER=1)
    table[:, ph.ORDER : ph.FACTORS] = [operation, 9, 9, 9]
    table[:, ph.FACTORS + operation] = factor
    return table


def difference(ours: Tensor, expected: list[Tensor]) -> tuple[float, float]:
    """(largest difference in levels, share of values that differ at all)."""
    distance = (ours - torch.stack(expected).float()).abs()
    return distance.max().item(), (distance > 0).float().mean().item()


FACTORS = {
    0: (0.6, 0.8341, 1.0, 1.3713),
    1: (0.6123, 0.8341, 1.0, 1.3713),
    2: (0.8037, 1.0, 1.1931),
    3: (-0.1, -0.0371, 0.0, 0.0613, 0.1),
}
REFERENCE = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)


@pytest.mark.parametrize(("operation", "factor"), [(op, f) for op, factors in FACTORS.items() for f in factors])
def test_jitter_operations_equal_torchvision(views: Tensor, operation: int, factor: float) -> None:
    """On uint8 values. Brightness is the same arithmetic. The others sum in another order: where the result lies within
    some 1e-4 of a whole number, cutting it may go the other way, by one level."""
    factor = float(np.float32(factor))
    ours = ph.photometric(views, jitter_rows(len(views), operation, factor))
    largest, share = difference(ours, [REFERENCE[operation](view, factor) for view in views])
    assert largest <= (0 if operation == 0 else 1)
    assert share < 1e-3


@pytest.mark.parametrize("operation", range(4))
def test_jitter_operations_are_near_pil(views: Tensor, operation: int) -> None:
    """PIL rounds luma where torchvision cuts it (one level), and turns the hue in 8-bit HSV (some levels; the mean
    stays).
    """
    pil = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)[operation]
    factor = float(np.float32(0.0837 if operation == 3 else 1.1837))
    ours = ph.photometric(views, jitter_rows(len(views), operation, factor))
    expected = [tv.pil_to_tensor(pil(tv.to_pil_image(view), factor)) for view in views]
    largest, _ = difference(ours, expected)
    assert largest <= (24 if operation == 3 else 1)
    assert (ours - torch.stack(expected).float()).mean().abs() < 1


def test_grey_equals_torchvision(views: Tensor) -> None:
    """Equal but where the weighted sum is a whole number, which torchvision's float32 may miss."""
    largest, share = difference(
        ph.photometric(views, rows(len(views), GREY=1)), [tv.rgb_to_grayscale(v, 3) for v in views]
    )
    assert largest <= 1 and share < 1e-3


def test_grey_of_every_level_is_exact() -> None:
    """0.9999 of each level (the weights add up to that), cut."""
    levels = torch.arange(256).float().view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(ph.luma(levels).flatten().long(), torch.arange(256) * 9999 // 10000)


@pytest.mark.parametrize("radius", [0.1337, 0.377, 0.7772, 0.9831, 1.2371, 1.437, 1.557, 1.97, 2.777, 5.171])
def test_blur_equals_pil(views: Tensor, radius: float) -> None:
    """Three box blurs with rounding, as PIL does them, in float32 instead of 24-bit fixed point: one level where the
    value before rounding lies on a half."""
    expected = [tv.pil_to_tensor(tv.to_pil_image(view).filter(ImageFilter.GaussianBlur(radius))) for view in views]
    largest, share = difference(ph.photometric(views, rows(len(views), BLUR=radius)), expected)
    assert largest <= 1 and share < 1e-3


def test_blur_of_radii_with_halves(views: Tensor) -> None:
    """Radius 1 weighs by sixths, so that halves abound; which way they go may add up over the six passes."""
    expected = [tv.pil_to_tensor(tv.to_pil_image(view).filter(ImageFilter.GaussianBlur(1.0))) for view in views]
    largest, _ = difference(ph.photometric(views, rows(len(views), BLUR=1.0)), expected)
    assert largest <= 3


def test_solarise_and_flip_are_exact(views: Tensor) -> None:
    solarised = [tv.pil_to_tensor(ImageOps.solarize(tv.to_pil_image(view), 128)) for view in views]
    assert difference(ph.photometric(views, rows(len(views), SOLARIZE=128)), solarised) == (0, 0)
    assert difference(ph.photometric(views, rows(len(views), FLIP=1)), [view.flip(-1) for view in views]) == (0, 0)
    assert torch.equal(ph.photometric(views, rows(len(views))), views.float())


def test_a_chain_follows_its_order(views: Tensor) -> None:
    """All operations in the drawn order, against torchvision and PIL one after the other."""
    params = ph.Draw([PUBLISHED] * 40)(np.random.default_rng(3)).numpy()
    many = views.repeat(8, 1, 1, 1)
    ours = ph.photometric(many, params)
    expected = []
    for view, row in zip(many, params, strict=True):
        x = view.flip(-1) if row[ph.FLIP] else view
        for operation in row[ph.ORDER : ph.FACTORS].astype(int) if row[ph.JITTER] else ():
            x = REFERENCE[operation](x, float(row[ph.FACTORS + operation]))
        x = tv.rgb_to_grayscale(x, 3) if row[ph.GREY] else x
        if row[ph.BLUR]:
            x = tv.pil_to_tensor(tv.to_pil_image(x).filter(ImageFilter.GaussianBlur(float(row[ph.BLUR]))))
        expected.append(tv.solarize(x, float(row[ph.SOLARIZE])) if row[ph.SOLARIZE] < 256 else x)
    # A level lost before the end may be amplified, and solarising turns a step over its threshold into a large one.
    distance = (ours - torch.stack(expected).float()).abs()
    assert (distance > 1).float().mean() < 1e-3
    assert (distance > 0).float().mean() < 5e-3


def test_result_does_not_depend_on_the_batch(views: Tensor) -> None:
    """To the last bit: alone, in a batch, in another order, in pieces of another size."""
    many = torch.randint(0, 256, (24, 3, 37, 41), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    params = ph.Draw([PUBLISHED] * 24)(np.random.default_rng(5))
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    together = ph.finish(many, params, mean, std)
    alone = torch.cat([ph.finish(many[i : i + 1], params[i : i + 1], mean, std) for i in range(24)])
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    assert torch.equal(together, alone)
    assert torch.equal(together[order], ph.finish(many[order], params[order], mean, std))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ph, "CPU_BYTES", 1)
        assert torch.equal(together, ph.finish(many, params, mean, std))


def test_finish_leaves_its_input_alone(views: Tensor) -> None:
    before = views.clone()
    ph.finish(views, ph.Draw([PUBLISHED] * len(views))(np.random.default_rng(0)), (0.5,) * 3, (0.5,) * 3)
    assert torch.equal(views, before)


def test_standardise_is_torchvisions_normalise(views: Tensor) -> None:
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    expected = tv.normalize(tv.to_dtype(views, torch.float32, scale=True), list(mean), list(std))
    torch.testing.assert_close(ph.standardise(views, mean, std), expected, rtol=0, atol=2e-6)


def test_drawn_rows_have_the_distributions_asked_for() -> None:
    """Each share within four standard deviations of 8,000 draws; factors and radii uniform over their ranges."""
    params = ph.Draw([PUBLISHED] * 8000)(np.random.default_rng(0)).numpy()
    shares = {ph.FLIP: 0.5, ph.JITTER: 0.8, ph.GREY: 0.2}
    for column, share in shares.items():
        assert abs(params[:, column].mean() - share) < 4 * (share * (1 - share) / 8000) ** 0.5
    for column, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)], start=ph.FACTORS):
        quartiles = np.quantile(params[:, column], [0, 0.25, 0.5, 0.75, 1])
        np.testing.assert_allclose(quartiles, np.linspace(low, high, 5), atol=0.03 * (high - low))
    blurred = params[:, ph.BLUR] > 0
    assert abs(blurred.mean() - 0.5) < 0.023
    np.testing.assert_allclose(np.quantile(params[blurred, ph.BLUR], [0, 0.5, 1]), [0.1, 1.05, 2.0], atol=0.06)
    assert abs((params[:, ph.SOLARIZE] == 128).mean() - 0.2) < 0.018
    orders, counts = np.unique(params[:, ph.ORDER : ph.FACTORS], axis=0, return_counts=True)
    assert len(orders) == 24 and (np.sort(orders, axis=1) == np.arange(4)).all()
    assert abs(counts - 8000 / 24).max() < 5 * (8000 / 24) ** 0.5


def test_a_strength_above_one_stops_at_zero() -> None:
    strong = ph.Draw(
        [ph.Strengths(**{**{f: getattr(PUBLISHED, f) for f in PUBLISHED.__slots__}, "factors": (1.5, 2.0, 1.0, 0.0)})]
    )
    factors = np.concatenate(
        [strong(np.random.default_rng(seed)).numpy()[:, ph.FACTORS : ph.GREY] for seed in range(200)]
    )
    assert (factors >= 0).all() and factors[:, 0].max() > 2 and (factors[:, 3] == 0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_plain_code_on_cuda_equals_cpu_within_a_level(views: Tensor) -> None:
    params = ph.Draw([PUBLISHED] * 20)(np.random.default_rng(7))
    many, unit = views.repeat(4, 1, 1, 1), ((0.0,) * 3, (1 / 255,) * 3)
    distance = (
        ph.finish(many.cuda(), params.cuda(), *unit, kernels="plain").cpu() - ph.finish(many, params, *unit)
    ).abs()
    assert (distance > 0.5).float().mean() < 1e-3
