"""What the model will see of a sample: its views by group as augmenters draw them, as pictures and texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import wrap
from typing import cast

import numpy as np
import torch
from torch import Tensor

from cosmos_ssl.api import Augmenter, ImageCrops, ImageGroup, Modality, Sample, TowerSpec
from cosmos_ssl.data.order import sample_rng

_GAP, _SIDE, _TEXT_WIDTH, _FONT = 8, 224, 640, 13  # pixels


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
    """The picture and all views of a sample, a row a group, and its texts below: uint8 [3, H, W]."""
    rows = [[_fitted(found.picture, _SIDE)], *([*views] for views in found.images.values())]
    lines = [f"{name} {view}: {text}" for name, texts in found.texts.items() for view, text in enumerate(texts, 1)]
    width = max(_TEXT_WIDTH, *(_GAP + sum(view.shape[2] + _GAP for view in row) for row in rows))
    heights = [max(view.shape[1] for view in row) + _GAP for row in rows]
    texts = _written(lines, width)
    sheet = torch.full((3, _GAP + sum(heights) + texts.shape[1], width), 255, dtype=torch.uint8)
    top = _GAP
    for row, height in zip(rows, heights, strict=True):
        left = _GAP
        for view in row:
            sheet[:, top : top + view.shape[1], left : left + view.shape[2]] = view
            left += view.shape[2] + _GAP
        top += height
    sheet[:, top:] = texts
    return sheet


def _written(lines: Sequence[str], width: int) -> Tensor:
    """Lines of text, folded to ``width`` pixels: uint8 [3, H, width]."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_FONT)
    letters = max(8, int((width - 2 * _GAP) / font.getlength("e")))
    folded = [piece for line in lines for piece in wrap(line, letters, subsequent_indent="    ")]
    canvas = Image.new("RGB", (width, len(folded) * (_FONT + 6) + _GAP), "white")
    ImageDraw.Draw(canvas).multiline_text((_GAP, 0), "\n".join(folded), "black", font, spacing=4)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def _fitted(picture: Tensor, side: int) -> Tensor:
    """The picture, made small enough for a square of ``side`` pixels."""
    from torchvision.transforms.v2.functional import resize

    scale = side / max(picture.shape[-2:])
    if scale >= 1:
        return picture
    fitted: Tensor = resize(picture, [max(1, round(n * scale)) for n in picture.shape[-2:]], antialias=True)
    return fitted
