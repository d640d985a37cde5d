"""What the model will see of a sample: its views by group as augmenters draw them, as pictures and texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from cosmos_ssl.api import Augmenter, ImageCrops, ImageGroup, Modality, Sample, TowerSpec
from cosmos_ssl.data.order import sample_rng

GAP = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleLook:
    """One sample and its views."""

    key: str
    picture: Tensor
    """uint8 [3, H, W], the whole picture."""
    images: Mapping[str, Tensor] = field(default_factory=dict)
    """uint8 [V, 3, S, S] by group, after the photometric work and without the normalisation."""
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)


def look(sample: Sample, augmenters: Mapping[Modality, Augmenter], tower: TowerSpec | None, *, seed: int, position: int) -> SampleLook:
    """Draw the views of a sample as the loader does at ``position`` of the first epoch. Raises BadSample."""
    images: dict[str, Tensor] = {}
    texts: Mapping[str, Sequence[str]] = {}
    for modality, augmenter in augmenters.items():
        rng = sample_rng(seed, 0, position, text=modality == "text")
        if modality == "text":
            texts = {name: list(map(str, cast(Sequence[str], views))) for name, views in augmenter.crop(sample, rng).items()}
            continue
        for name, crops in augmenter.crop(sample, rng).items():
            assert isinstance(crops, ImageCrops)
            group = ImageGroup(pixels=crops.pixels[:, None], params=crops.params[:, None])
            images[name] = _shown(augmenter.finish(group).pixels[:, 0], tower)
    return SampleLook(key=sample.key, picture=sample.decode(), images=images, texts=texts)


def _shown(pixels: Tensor, tower: TowerSpec | None) -> Tensor:
    """Normalised pixels [V, 3, S, S] as uint8."""
    if pixels.dtype == torch.uint8 or tower is None:
        return pixels.to(torch.uint8)
    mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (tower.mean, tower.std))
    return (pixels.float() * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)


def contact_sheet(found: SampleLook) -> Tensor:
    """The picture and all views of a sample side by side, a row a group: uint8 [3, H, W]."""
    rows = [[_fitted(found.picture, 224)], *([*views] for views in found.images.values())]
    height = GAP + sum(max(view.shape[1] for view in row) + GAP for row in rows)
    width = GAP + max(sum(view.shape[2] + GAP for view in row) for row in rows)
    sheet = torch.full((3, height, width), 255, dtype=torch.uint8)
    top = GAP
    for row in rows:
        left = GAP
        for view in row:
            sheet[:, top : top + view.shape[1], left : left + view.shape[2]] = view
            left += view.shape[2] + GAP
        top += max(view.shape[1] for view in row) + GAP
    return sheet


def _fitted(picture: Tensor, side: int) -> Tensor:
    """The picture, made small enough for a square of ``side`` pixels."""
    from torchvision.transforms.v2.functional import resize

    scale = side / max(picture.shape[-2:])
    if scale >= 1:
        return picture
    fitted: Tensor = resize(picture, [max(1, round(n * scale)) for n in picture.shape[-2:]], antialias=True)
    return fitted
