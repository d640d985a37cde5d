"""Multi-crop and resize-crop as parts: groups, settings of each view, determinism, options that are refused."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cosmos_ssl.api import BadSample, CropGroup, Sample, Spec, TowerSpec, ViewSpec
from cosmos_ssl_plugins.augmenters import geometry
from cosmos_ssl_plugins.augmenters import photometric as ph
from cosmos_ssl_plugins.augmenters.multi_crop import MultiCrop
from cosmos_ssl_plugins.augmenters.resize_crop import ResizeCrop

SPEC = Spec(embed_dim=8)


def sample(width: int = 90, height: int = 60, kind: str = "PNG", mode: str = "RGB") -> Sample:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).convert(mode).save(stream, kind)
    return Sample(key="k", image=stream.getvalue())


def small(**options: Any) -> MultiCrop:
    return MultiCrop(SPEC, global_crops_size=32, local_crops_size=16, **options)


def batch(augmenter: MultiCrop | ResizeCrop, name: str, count: int) -> CropGroup:
    crops = [augmenter.crop(sample(), np.random.default_rng(seed))[name] for seed in range(count)]
    return CropGroup(pixels=torch.stack([c.pixels for c in crops], 1), params=torch.stack([c.params for c in crops], 1))


def test_published_defaults() -> None:
    assert MultiCrop(SPEC).offers() == {"global": ViewSpec(views=2, size=224), "local": ViewSpec(views=6, size=96)}


def test_groups_and_shapes() -> None:
    augmenter = small(global_crops_number=3, local_crops_number=2)
    crops = augmenter.crop(sample(), np.random.default_rng(0))
    assert {name: tuple(c.pixels.shape) for name, c in crops.items()} == {
        "global": (3, 3, 32, 32),
        "local": (2, 3, 16, 16),
    }
    assert all(c.pixels.dtype == torch.uint8 and c.params.shape[1] == ph.COLUMNS for c in crops.values())
    assert {name: (v.views, v.size) for name, v in augmenter.offers().items()} == {"global": (3, 32), "local": (2, 16)}


def test_no_local_views() -> None:
    augmenter = small(local_crops_number=0)
    assert list(augmenter.offers()) == ["global"]
    assert list(augmenter.crop(sample(), np.random.default_rng(0))) == ["global"]


def test_same_generator_same_views_and_another_one_others() -> None:
    augmenter = small()
    first, again, other = (augmenter.crop(sample(), np.random.default_rng(seed)) for seed in (7, 7, 8))
    for name in ("global", "local"):
        assert torch.equal(first[name].pixels, again[name].pixels) and torch.equal(
            first[name].params, again[name].params
        )
        assert not torch.equal(first[name].pixels, other[name].pixels) and not torch.equal(
            first[name].params, other[name].params
        )


def test_parameters_do_not_depend_on_the_picture() -> None:
    """A fixed number of draws: a picture that fits at the first try and one that never fits give the same colours."""
    augmenter = small()
    usual, narrow = (augmenter.crop(s, np.random.default_rng(0)) for s in (sample(90, 60), sample(200, 10)))
    assert all(torch.equal(usual[name].params, narrow[name].params) for name in usual)


def test_each_view_has_its_own_settings() -> None:
    """Blur 1.0, 0.1, 0.1 and 0.5; solarise none, 0.2, 0.2 and none, over 600 samples."""
    augmenter = small(global_crops_number=3, local_crops_number=1)
    one = sample(8, 8)
    drawn = [augmenter.crop(one, np.random.default_rng(seed)) for seed in range(600)]
    rows = torch.stack([torch.cat([d["global"].params, d["local"].params]) for d in drawn])  # [samples, views, columns]
    blurred = (rows[..., ph.BLUR] > 0).float().mean(0)
    solarised = (rows[..., ph.SOLARIZE] < 256).float().mean(0)
    torch.testing.assert_close(blurred, torch.tensor([1.0, 0.1, 0.1, 0.5]), rtol=0, atol=0.085)
    torch.testing.assert_close(solarised, torch.tensor([0.0, 0.2, 0.2, 0.0]), rtol=0, atol=0.07)
    assert blurred[0] == 1 and solarised[0] == solarised[3] == 0


def test_finish_normalises_by_the_towers_values() -> None:
    tower = TowerSpec(width=8, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))
    augmenter = MultiCrop(
        Spec(embed_dim=8, image=tower),
        global_crops_size=16,
        local_crops_number=0,
        flip_prob=0,
        color_jitter_prob=0,
        grayscale_prob=0,
        gaussian_blur_probs=(0, 0, 0),
        solarize_probs=(0, 0, 0),
    )
    group = batch(augmenter, "global", 3)
    finished = augmenter.finish(group)
    expected = (group.pixels / 255 - torch.tensor(tower.mean).view(3, 1, 1)) / torch.tensor(tower.std).view(3, 1, 1)
    assert finished.pixels.dtype == torch.float32
    torch.testing.assert_close(finished.pixels, expected, rtol=0, atol=2e-6)


def test_finish_does_not_mix_samples() -> None:
    augmenter = small()
    group = batch(augmenter, "global", 6)
    whole = augmenter.finish(group).pixels
    part = augmenter.finish(CropGroup(pixels=group.pixels[:, 2:4], params=group.params[:, 2:4])).pixels
    assert torch.equal(whole[:, 2:4], part)


@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "1")]
)
def test_pictures_of_all_kinds(kind: str, mode: str) -> None:
    assert small().crop(sample(kind=kind, mode=mode), np.random.default_rng(0))["local"].pixels.shape == (6, 3, 16, 16)


@pytest.mark.parametrize(("width", "height"), [(1, 50_000), (50_000, 1)])
def test_very_long_pictures_are_cut_before_they_are_resized(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A box is at most 4/3 as long as it is wide: what is resized is never larger than that, whatever the picture
    is.
    """
    resized, interpolate = [], geometry.F.interpolate
    monkeypatch.setattr(
        geometry.F,
        "interpolate",
        lambda view, **options: resized.append(view.shape[-2:]) or interpolate(view, **options),
    )
    one = sample(width, height)
    for augmenter in (small(), ResizeCrop(SPEC, size=32)):
        views = augmenter.crop(one, np.random.default_rng(0))
        assert views["global"].pixels.shape[-2:] == (32, 32)
    assert len(resized) == 9 and {tuple(shape) for shape in resized} == {(1, 1)}


def test_bad_pictures_are_bad_samples() -> None:
    broken = sample(kind="JPEG").image
    assert broken is not None
    for image in (None, b"", b"no picture", broken[: len(broken) // 2]):
        with pytest.raises(BadSample):
            small().crop(Sample(key="k", image=image), np.random.default_rng(0))
    with pytest.raises(BadSample, match="too large"):
        small().crop(Sample(key="k", image=broken, max_pixels=100), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_crops_number": 0}, "global_crops_number: 0"),
        ({"local_crops_number": -1}, "local_crops_number: -1"),
        ({"local_crops_scale": (0.5, 0.4)}, "local_crops_scale"),
        ({"grayscale_prob": 1.5}, "grayscale_prob: 1.5"),
        ({"gaussian_blur_probs": (1.0, -0.1, 0.5)}, "gaussian_blur_probs: -0.1"),
        ({"hue": 0.6}, "hue: 0.6 is not between 0 and 0.5"),
        ({"brightness": -0.1}, "brightness: -0.1 is below 0"),
        ({"solarize_threshold": 256}, "solarize_threshold: 256"),
        ({"gaussian_blur_radius": (0.0, 2.0)}, "gaussian_blur_radius"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_resize_crop_is_one_plain_view() -> None:
    augmenter = ResizeCrop(SPEC, size=16)
    assert augmenter.offers() == {"global": ViewSpec(views=1, size=16)}
    group = batch(augmenter, "global", 3)
    assert group.pixels.shape == (1, 3, 3, 16, 16) and group.params.shape == (1, 3, 0)
    finished = augmenter.finish(group).pixels
    torch.testing.assert_close(finished, ph.standardise(group.pixels, augmenter.mean, augmenter.std), rtol=0, atol=0)


def test_resize_crop_may_flip() -> None:
    augmenter = ResizeCrop(SPEC, size=16, flip=True)
    group = batch(augmenter, "global", 40)
    flipped = group.params.flatten() > 0
    assert 8 < flipped.sum() < 32
    finished = augmenter.finish(group).pixels[0]
    plain = ph.standardise(group.pixels[0], augmenter.mean, augmenter.std)
    assert torch.equal(finished[~flipped], plain[~flipped]) and torch.equal(finished[flipped], plain[flipped].flip(-1))


def test_decoding_keeps_pils_values_and_lies_channels_last() -> None:
    one = sample(kind="JPEG")
    assert one.image is not None
    image = one.decode()
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(Image.open(io.BytesIO(one.image))))
    assert image.permute(1, 2, 0).is_contiguous()
