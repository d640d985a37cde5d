"""Pictures of an evaluation, drawn with PIL and its own font: uint8 [3, H, W]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from colorsys import hls_to_rgb
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cosmos_ssl.evaluation.attention_maps import AttentionMap

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

SIDE, GAP, LINE = 112, 8, 16  # pixels: a picture's side, the space around it, a line of text
_TEXT_WIDTH = 420
_INK, _GREY, _GREEN, _RED = (30, 30, 30), (110, 110, 110), (0, 120, 60), (200, 50, 40)
_HEAT = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], np.float32)  # five steps of 'inferno'


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A picture and the texts found for it, best first: (text, score, whether it is the picture's own)."""

    picture: Tensor
    found: Sequence[tuple[str, float, bool]]
    note: str


def draw_matches(matches: Sequence[Match]) -> Tensor:
    """One row a picture: its best texts with their scores, its own in green, and a note."""
    canvas, draw = _canvas(GAP + SIDE + GAP + _TEXT_WIDTH + GAP, GAP + len(matches) * (SIDE + GAP))
    for row, match in enumerate(matches):
        top, left = GAP + row * (SIDE + GAP), GAP + SIDE + GAP
        canvas.paste(_thumbnail(match.picture), (GAP, top))
        for line, (text, score, own) in enumerate(match.found):
            _write(draw, (left, top + line * (LINE + 6)), f"{score:.2f}  {text}", _GREEN if own else _INK)
        _write(draw, (left, top + SIDE - LINE), match.note, _GREY)
    return _tensor(canvas)


def draw_neighbours(rows: Sequence[tuple[Tensor, Sequence[tuple[Tensor, bool]]]]) -> Tensor:
    """One row a picture: itself, then its nearest neighbours, framed green where the label is the same and red where not."""
    widest = max(len(found) for _, found in rows)
    canvas, draw = _canvas(2 * GAP + SIDE + widest * (SIDE + GAP) + GAP, GAP + len(rows) * (SIDE + GAP))
    for row, (picture, found) in enumerate(rows):
        top = GAP + row * (SIDE + GAP)
        canvas.paste(_thumbnail(picture), (GAP, top))
        for column, (neighbour, same) in enumerate(found):
            left = 3 * GAP + SIDE + column * (SIDE + GAP)
            canvas.paste(_thumbnail(neighbour), (left, top))
            draw.rectangle((left - 2, top - 2, left + SIDE + 1, top + SIDE + 1), outline=_GREEN if same else _RED, width=2)
    return _tensor(canvas)


def draw_attention(pictures: Sequence[Tensor], maps: Sequence[AttentionMap], *, side: int = SIDE) -> Tensor:
    """One row a picture: itself, the text's look at it, and its look at the words (darker is more).

    ``pictures`` are uint8 [3, H, W], cut as the model saw them; ``side`` is what they are shown at, in pixels.
    """
    canvas, draw = _canvas(GAP + 2 * (side + GAP) + _TEXT_WIDTH + GAP, GAP + len(maps) * (side + GAP))
    for row, (picture, found) in enumerate(zip(pictures, maps, strict=True)):
        top = GAP + row * (side + GAP)
        canvas.paste(_thumbnail(picture, side), (GAP, top))
        canvas.paste(_thumbnail(overlay(picture, found.patches), side), (2 * GAP + side, top))
        _draw_words(draw, 3 * GAP + 2 * side, top, found.words, side)
    return _tensor(canvas)


def draw_words(words: Sequence[tuple[str, float]]) -> Tensor:
    """Words on ground as strong as their weights in 0..1 (darker is more), on as many lines as they take."""
    height = max((y + LINE for _, y, _, _, _ in _placed(words)), default=LINE)
    canvas, draw = _canvas(2 * GAP + _TEXT_WIDTH, 2 * GAP + height)
    _draw_words(draw, GAP, GAP, words, height)
    return _tensor(canvas)


def class_colours(count: int) -> list[tuple[int, int, int]]:
    """Colours (red, green, blue) to tell classes apart: hues a golden angle apart, in two strengths of light."""
    hues = (hls_to_rgb(0.02 + n * 0.381966, 0.62 - 0.2 * (n % 2), 0.85) for n in range(count))
    return [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in hues]


def draw_classes(picture: Tensor, classes: Tensor) -> Tensor:
    """A picture, uint8 [3, H, W], under the colours of its classes, int64 [H, W]: uint8 [3, H, W]."""
    colours = torch.tensor(class_colours(int(classes.max()) + 1), dtype=torch.float32)
    return picture.float().lerp(colours[classes].permute(2, 0, 1), 0.6).round().to(torch.uint8)


def overlay(picture: Tensor, weights: Tensor) -> Tensor:
    """A picture, uint8 [3, H, W], under the colours of weights in 0..1 [rows, columns]: uint8 [3, H, W]."""
    from PIL import Image

    height, width = picture.shape[-2:]
    smooth = Image.fromarray(weights.float().numpy()).resize((width, height), Image.Resampling.BILINEAR)
    place = np.clip(np.asarray(smooth, np.float32), 0, 1) * (len(_HEAT) - 1)
    step = np.minimum(place.astype(int), len(_HEAT) - 2)
    part = (place - step.astype(np.float32))[..., None]
    colours = torch.from_numpy(_HEAT[step] * (1 - part) + _HEAT[step + 1] * part).permute(2, 0, 1)
    return picture.float().lerp(colours, 0.55).round().to(torch.uint8)


def _placed(words: Sequence[tuple[str, float]]) -> Iterator[tuple[int, int, int, str, float]]:
    """Words in lines of the text column: left, top, width, word, weight."""
    x = y = 0
    for word, weight in words:
        width = min(int(_font().getlength(word)) + 6, _TEXT_WIDTH)
        if x + width > _TEXT_WIDTH:
            x, y = 0, y + LINE + 6
        yield x, y, width, word, weight
        x += width


def _draw_words(draw: ImageDraw.ImageDraw, left: int, top: int, words: Sequence[tuple[str, float]], height: int) -> None:
    """Words on shaded ground, in lines; what does not fit into the height is left out."""
    for x, y, width, word, weight in _placed(words):
        if y + LINE > height:
            return
        x, y = left + x, top + y
        ground = (255, round(255 - 170 * weight), round(255 - 200 * weight))
        draw.rectangle((x, y, x + width - 2, y + LINE - 1), fill=ground)
        _write(draw, (x + 2, y + 1), word, _INK)


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, colour: tuple[int, int, int]) -> None:
    """One line of text, cut to the width of the text column."""
    text = " ".join(text.split())[:300]
    while text and _font().getlength(text) > _TEXT_WIDTH:
        text = text.removesuffix("...")[:-2].rstrip() + "..."
    draw.text(place, text, fill=colour, font=_font())


@cache
def _font() -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(13)


def _canvas(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    from PIL import Image, ImageDraw

    canvas = Image.new("RGB", (width, height), "white")
    return canvas, ImageDraw.Draw(canvas)


def _thumbnail(picture: Tensor, side: int = SIDE) -> Image.Image:
    """uint8 [3, H, W] fitted into a grey square of ``side`` pixels."""
    from PIL import Image, ImageOps

    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    return ImageOps.pad(image, (side, side), color=(225, 225, 225))


def _tensor(canvas: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()
