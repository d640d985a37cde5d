"""What the model will see of a sample: its views by group as augmenters draw them, as pictures and texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cosmos_ssl.api import Augmenter, Modality, Sample, TowerSpec
from cosmos_ssl.api.part import describe
from cosmos_ssl.data.collate import Collator, checked_crops
from cosmos_ssl.data.order import sample_rng
from cosmos_ssl.models.contract import blaming, checked_pixels

_GAP, _SIDE, _FONT = 8, 224, 14  # pixels
_LEAST, _ROOM = 440, 960  # pixels: the least width, and the most that views take in a row


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleLook:
    """One sample and its views."""

    key: str
    picture: Tensor
    """uint8 [3, H, W], the whole picture."""
    images: Mapping[str, Tensor] = field(default_factory=dict)
    """uint8 [V, 3, S, S] by group, after the photometric work and without the normalisation."""
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)


def look(
    sample: Sample, augmenters: Mapping[Modality, Augmenter], tower: TowerSpec | None, *, seed: int, position: int
) -> SampleLook:
    """Draw the views of a sample as the loader does at ``position`` of the first epoch. Raises BadSample."""
    views: dict[Modality, Mapping[str, Any]] = {}
    for modality, augmenter in augmenters.items():
        drawn = augmenter.crop(sample, sample_rng(seed, 0, position, text=modality == "text"))
        whose = describe(augmenter, f"augmenters.{modality}")
        views[modality] = checked_crops(drawn, augmenter.offers(), modality, whose)
    texts = {name: list(found) for name, found in views.pop("text", {}).items()}
    collator = Collator(1)
    collator.add(sample, views)
    images = {}
    for name, group in collator.batch(None).image.items():
        with blaming(augmenters["image"], "augmenters.image"):
            finished = checked_pixels(group, augmenters["image"].finish(group))
        images[name] = _shown(finished.pixels[:, 0], tower or TowerSpec(width=0))
    return SampleLook(key=sample.key, picture=sample.decode(), images=images, texts=texts)


def _shown(pixels: Tensor, tower: TowerSpec) -> Tensor:
    """Normalised pixels [V, 3, S, S] as uint8."""
    mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (tower.mean, tower.std))
    return (pixels.float() * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)


def contact_sheet(found: SampleLook) -> Tensor:
    """The picture with the views of the first group, the other groups below, then the texts, as wide as the views are:
    uint8 [3, H, W].

    Small views are shown several times as large, all alike.
    """
    groups = list(found.images.values())
    factor = max(1, _SIDE // max((group.shape[-1] for group in groups), default=_SIDE))
    shown = [[*_enlarged(group, factor)] for group in groups]
    first, *others = [[_fitted(found.picture, _SIDE), *(shown[0] if shown else ())], *shown[1:]]
    rows = [row for group in (first, *others) for row in _folded(group)]
    lines = [
        f"{name}: {len(group)} views of {group.shape[-1]} x {group.shape[-2]} pixels"
        for name, group in found.images.items()
    ]
    lines += [f"{name} {view}: {text}" for name, texts in found.texts.items() for view, text in enumerate(texts, 1)]
    width = max(_LEAST, *(sum(view.shape[2] + _GAP for view in row) for row in rows)) + _GAP
    texts = _written(lines, width)
    sheet = torch.full(
        (3, _GAP + sum(max(view.shape[1] for view in row) + _GAP for row in rows) + texts.shape[1], width),
        255,
        dtype=torch.uint8,
    )
    top = _GAP
    for row in rows:
        left = _GAP
        for view in row:
            sheet[:, top : top + view.shape[1], left : left + view.shape[2]] = view
            left += view.shape[2] + _GAP
        top += max(view.shape[1] for view in row) + _GAP
    sheet[:, top:] = texts
    return sheet


def _folded(views: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Views in rows that are not wider than ``_ROOM``."""
    row: list[Tensor] = []
    for view in views:
        if row and sum(one.shape[2] + _GAP for one in [*row, view]) > _ROOM:
            yield row
            row = []
        row.append(view)
    yield row


def _written(lines: Sequence[str], width: int) -> Tensor:
    """Lines of text, folded to ``width`` pixels: uint8 [3, H, width]."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_FONT)
    folded: list[str] = []
    for line in lines:
        folded.append("")
        for word in line.split():
            longer = f"{folded[-1]} {word}" if folded[-1] else word
            if font.getlength(longer) > width - 2 * _GAP and folded[-1].strip():
                longer = f"    {word}"
                folded.append("")
            folded[-1] = longer
    canvas = Image.new("RGB", (width, len(folded) * (_FONT + 6) + _GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(folded):
        draw.text((_GAP, number * (_FONT + 6)), line, "black", font)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def _enlarged(picture: Tensor, factor: int) -> Tensor:
    """Each pixel as a square of ``factor`` x ``factor``."""
    return picture.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def _fitted(picture: Tensor, side: int) -> Tensor:
    """The picture, made to fit a square of ``side`` pixels."""
    from torchvision.transforms.v2.functional import resize

    scale = side / max(picture.shape[-2:])
    if scale >= 1:
        return _enlarged(picture, int(scale))
    fitted: Tensor = resize(picture, [max(1, round(n * scale)) for n in picture.shape[-2:]], antialias=True)
    return fitted
