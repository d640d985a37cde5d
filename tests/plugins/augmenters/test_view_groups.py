"""View groups: each cut and changed in its own way, whatever stands beside it; options that are refused."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cosmos_ssl import registry
from cosmos_ssl.api import BadSample, CropGroup, Sample, Spec, TowerSpec, ViewSpec
from cosmos_ssl_plugins.augmenters import photometric as ph
from cosmos_ssl_plugins.augmenters.view_groups import ViewGroup, ViewGroups

SPEC = Spec(embed_dim=8)
STRONG = ViewGroup(
    number=2,
    size=16,
    scale=(0.08, 1.0),
    flip_prob=0.5,
    color_jitter_prob=0.8,
    saturation=0.4,
    grayscale_prob=0.2,
    gaussian_blur_prob=0.5,
    solarize_prob=0.3,
)
PLAIN = ViewGroup(size=32)


def sample(width: int = 90, height: int = 60) -> Sample:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return Sample(key="k", image=stream.getvalue())


def make(spec: Spec = SPEC, **groups: ViewGroup | None) -> ViewGroups:
    return ViewGroups(spec, groups=groups)


def batch(augmenter: ViewGroups, name: str, count: int, one: Sample | None = None) -> CropGroup:
    one = one or sample()
    crops = [augmenter.crop(one, np.random.default_rng(seed))[name] for seed in range(count)]
    return CropGroup(pixels=torch.stack([c.pixels for c in crops], 1), params=torch.stack([c.params for c in crops], 1))


def test_masks_of_patches() -> None:
    """Drawn last, a group at a time: the views are those of a run without them."""
    spec = replace(SPEC, image=TowerSpec(width=8, patch_size=4))
    masked = ViewGroup(number=3, size=16, flip_prob=0.5, mask_probability=1.0, mask_ratio=(0.25, 0.5))
    augmenter = make(spec, a=masked, b=PLAIN)
    assert augmenter.offers()["a"] == ViewSpec(views=3, size=16, masks=True) and not augmenter.offers()["b"].masks
    crops = augmenter.crop(sample(), np.random.default_rng(0))
    assert crops["a"].masks is not None and crops["b"].masks is None
    counts = crops["a"].masks.sum(1)
    assert crops["a"].masks.shape == (3, 16) and counts.min() >= 4 and counts.max() <= 8
    options = {"mask_min_patches": 9, "mask_fill": False, "mask_ratio": (0.5625, 0.5625), "mask_aspect": (1.0, 1.0)}
    square = make(spec, a=replace(masked, **options)).crop(sample(), np.random.default_rng(0))["a"].masks
    assert square is not None and [int(m.view(4, 4).any(0).sum()) for m in square] == [3, 3, 3]
    plain = make(spec, a=replace(masked, mask_probability=0.0)).crop(sample(), np.random.default_rng(0))["a"]
    assert torch.equal(plain.pixels, crops["a"].pixels) and torch.equal(plain.params, crops["a"].params)
    with pytest.raises(ValueError, match=r"groups\.a\.mask_probability: the image tower has no patches to mask"):
        make(a=masked)


def test_groups_and_shapes() -> None:
    augmenter = make(**{"global": PLAIN, "ssl": STRONG})
    assert augmenter.offers() == {"global": ViewSpec(views=1, size=32), "ssl": ViewSpec(views=2, size=16)}
    crops = augmenter.crop(sample(), np.random.default_rng(0))
    assert {name: tuple(c.pixels.shape) for name, c in crops.items()} == {
        "global": (1, 3, 32, 32),
        "ssl": (2, 3, 16, 16),
    }
    assert all(c.pixels.dtype == torch.uint8 for c in crops.values())
    assert crops["global"].params.shape == (1, 0) and crops["ssl"].params.shape == (2, ph.COLUMNS)


def test_a_group_depends_on_nothing_but_its_name_and_options() -> None:
    alone, beside, after = make(ssl=STRONG), make(ssl=STRONG, other=STRONG), make(**{"global": PLAIN, "ssl": STRONG})
    one = sample()
    views = [augmenter.crop(one, np.random.default_rng(7)) for augmenter in (alone, beside, after)]
    for other in views[1:]:
        assert torch.equal(views[0]["ssl"].pixels, other["ssl"].pixels) and torch.equal(
            views[0]["ssl"].params, other["ssl"].params
        )
    assert not torch.equal(views[1]["ssl"].params, views[1]["other"].params)
    assert not torch.equal(views[1]["ssl"].pixels, views[1]["other"].pixels)


def test_same_generator_same_views_and_another_one_others() -> None:
    augmenter, one = make(ssl=STRONG), sample()
    first, again, other = (augmenter.crop(one, np.random.default_rng(seed))["ssl"] for seed in (7, 7, 8))
    assert torch.equal(first.pixels, again.pixels) and torch.equal(first.params, again.params)
    assert not torch.equal(first.pixels, other.pixels) and not torch.equal(first.params, other.params)
    assert not torch.equal(first.pixels[0], first.pixels[1])


def test_what_follows_in_the_generator_does_not_depend_on_the_groups() -> None:
    left = []
    for augmenter in (make(ssl=STRONG), make(**{"global": PLAIN, "ssl": STRONG})):
        rng = np.random.default_rng(3)
        augmenter.crop(sample(), rng)
        left.append(rng.random())
    assert left[0] == left[1]


def test_each_group_has_its_own_settings() -> None:
    """How often what happens, over 600 samples, and factors within their ranges."""
    weak = ViewGroup(size=4, flip_prob=0.5, color_jitter_prob=0.3, brightness=0.1, hue=0.05)
    strong = ViewGroup(
        number=2, size=4, color_jitter_prob=0.8, brightness=0.4, grayscale_prob=0.2, gaussian_blur_prob=0.5
    )
    augmenter, one = make(weak=weak, strong=strong), sample(8, 8)
    rows = {name: batch(augmenter, name, 600, one).params for name in ("weak", "strong")}
    columns = [ph.FLIP, ph.JITTER, ph.GREY, ph.BLUR]
    for name, odds in (("weak", [0.5, 0.3, 0, 0]), ("strong", [0, 0.8, 0.2, 0.5])):
        shares = (rows[name][..., columns] > 0).float().mean((0, 1))
        torch.testing.assert_close(shares, torch.tensor(odds), rtol=0, atol=0.085)
        assert (shares[torch.tensor(odds) == 0] == 0).all()
    brightness = rows["weak"][..., ph.FACTORS]
    assert 0.9 <= brightness.min() < 0.91 and 1.09 < brightness.max() <= 1.1
    assert rows["strong"][..., ph.FACTORS].max() > 1.3


def test_crops_cover_the_share_asked_for() -> None:
    """A ramp from black to white: a crop of the whole picture holds all of it, one of a tenth of the area does not."""
    ramp = np.broadcast_to(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (64, 64, 3))
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(ramp)).save(stream, "PNG")
    augmenter = make(
        whole=ViewGroup(size=64, scale=(1.0, 1.0), ratio=(1.0, 1.0)),
        part=ViewGroup(size=64, scale=(0.1, 0.1), ratio=(1.0, 1.0)),
    )
    crops = augmenter.crop(Sample(key="k", image=stream.getvalue()), np.random.default_rng(0))
    spread = {name: int(c.pixels.max()) - int(c.pixels.min()) for name, c in crops.items()}
    assert spread["whole"] == 255 and spread["part"] < 110


def test_finish_normalises_by_the_towers_values() -> None:
    tower = TowerSpec(width=8, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))
    augmenter = make(Spec(embed_dim=8, image=tower), plain=PLAIN, flipped=ViewGroup(size=32, flip_prob=1.0))
    for name in ("plain", "flipped"):
        group = batch(augmenter, name, 3)
        expected = (group.pixels / 255 - torch.tensor(tower.mean).view(3, 1, 1)) / torch.tensor(tower.std).view(3, 1, 1)
        finished = augmenter.finish(group).pixels
        assert finished.dtype == torch.float32
        torch.testing.assert_close(finished, expected.flip(-1) if name == "flipped" else expected, rtol=0, atol=2e-6)


def test_finish_does_not_mix_samples() -> None:
    augmenter = make(ssl=STRONG)
    group = batch(augmenter, "ssl", 6)
    whole = augmenter.finish(group).pixels
    part = augmenter.finish(CropGroup(pixels=group.pixels[:, 2:4], params=group.params[:, 2:4])).pixels
    assert torch.equal(whole[:, 2:4], part)


def test_bad_pictures_are_bad_samples() -> None:
    with pytest.raises(BadSample):
        make(ssl=STRONG).crop(Sample(key="k", image=b"no picture"), np.random.default_rng(0))


def test_a_group_set_to_null_is_left_out() -> None:
    assert list(make(**{"global": PLAIN, "ssl": None}).offers()) == ["global"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"number": 0}, "groups.ssl.number: 0 leaves no view"),
        ({"size": 0}, "groups.ssl.size: 0 is no size"),
        ({"scale": (0.5, 0.4)}, "groups.ssl.scale"),
        ({"ratio": (2.0, 1.0)}, "groups.ssl.ratio"),
        ({"grayscale_prob": 1.5}, "groups.ssl.grayscale_prob: 1.5"),
        ({"flip_prob": -0.5}, "groups.ssl.flip_prob: -0.5"),
        ({"hue": 0.6}, "groups.ssl.hue: 0.6 is not between 0 and 0.5"),
        ({"brightness": -0.1}, "groups.ssl.brightness: -0.1 is below 0"),
        ({"solarize_threshold": 256}, "groups.ssl.solarize_threshold: 256"),
        ({"gaussian_blur_radius": (0.0, 2.0)}, "groups.ssl.gaussian_blur_radius"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**{"global": PLAIN, "ssl": ViewGroup(**options)})


def test_no_group_is_refused() -> None:
    with pytest.raises(ValueError, match="groups: no group is left"):
        make(ssl=None)


def test_options_of_a_config_become_groups() -> None:
    """As a config gives them; faults are located at ``groups.NAME.KEY``."""
    record = registry.find("augmenters", "view_groups")
    values, faults = registry.check_options(
        record, ViewGroups, {"groups": {"ssl": {"number": 2, "scale": [0.08, 1]}, "old": None}}
    )
    assert not faults and values == {"groups": {"ssl": ViewGroup(number=2, scale=(0.08, 1.0)), "old": None}}
    wrong = {"groups": {"ssl": {"sice": 3, "scale": [0.5], "number": 1.5}, "other": 3}}
    _, faults = registry.check_options(record, ViewGroups, wrong)
    assert {key for key, _ in faults} == {"groups.ssl.sice", "groups.ssl.scale", "groups.ssl.number", "groups.other"}
