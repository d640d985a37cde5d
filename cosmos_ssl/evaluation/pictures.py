"""Pictures of an evaluation, drawn with PIL and its own font: uint8 [3, H, W]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from colorsys import hls_to_rgb
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosmos_ssl.evaluation.attention_maps import AttentionMap

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

SIDE, GAP, LINE = 112, 8, 22  # pixels: a picture's side, the space around it, a line of text
WORD, WORD_GAP = 18, 6  # pixels: letters of words on their ground, which is so much higher, as is the space of lines
_TEXT_WIDTH, _FONT, _SCORE, _SCALE = 560, 14, 48, 10  # pixels: the most a text takes, letters, the scores, a scale
_INK, _GREY, _GREEN, _RED = (30, 30, 30), (110, 110, 110), (0, 120, 60), (200, 50, 40)
_INFERNO = [(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)]
_HEAT = np.array(_INFERNO, np.float32)

Colours: TypeAlias = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Weights in 0..1 -> red, green, blue in 0..255."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A picture and the texts found for it, best first: (text, score, whether it is the picture's own)."""

    picture: Tensor
    found: Sequence[tuple[str, float, bool]]
    note: str


def draw_matches(matches: Sequence[Match]) -> Tensor:
    """One row a picture: its best texts with their scores, its own in green, a note below; as wide as the texts are."""
    rows = [
        [(f"{score:.2f}", _cut(text), _GREEN if own else _INK) for text, score, own in match.found]
        + [("", _cut(match.note), _GREY)]
        for match in matches
    ]
    # twice the space, so that a text stands nearest to its own picture
    height = max([SIDE, *(len(row) * LINE for row in rows)]) + 2 * GAP
    left = GAP + SIDE + 2 * GAP
    canvas, draw = _canvas(
        left + _SCORE + max(_width(text) for row in rows for _, text, _ in row) + GAP, len(matches) * height
    )
    for number, (match, row) in enumerate(zip(matches, rows, strict=True)):
        top = GAP + number * height
        canvas.paste(_thumbnail(match.picture), (GAP, top))
        first = top + (height - 2 * GAP - len(row) * LINE) // 2 + 2
        for line, (score, text, colour) in enumerate(row):
            draw.text((left, first + line * LINE), score, fill=colour, font=_font(_FONT))
            draw.text((left + _SCORE, first + line * LINE), text, fill=colour, font=_font(_FONT))
    return _tensor(canvas)


def draw_neighbours(rows: Sequence[tuple[Tensor, Sequence[tuple[Tensor, bool]]]]) -> Tensor:
    """One row a picture: itself, then its nearest neighbours, framed green where the label is the same, else red."""
    widest = max(len(found) for _, found in rows)
    canvas, draw = _canvas(2 * GAP + SIDE + widest * (SIDE + GAP) + GAP, GAP + len(rows) * (SIDE + GAP))
    for row, (picture, found) in enumerate(rows):
        top = GAP + row * (SIDE + GAP)
        canvas.paste(_thumbnail(picture), (GAP, top))
        for column, (neighbour, same) in enumerate(found):
            left = 3 * GAP + SIDE + column * (SIDE + GAP)
            canvas.paste(_thumbnail(neighbour), (left, top))
            draw.rectangle(
                (left - 2, top - 2, left + SIDE + 1, top + SIDE + 1), outline=_GREEN if same else _RED, width=2
            )
    return _tensor(canvas)


def draw_attention(pictures: Sequence[Tensor], maps: Sequence[AttentionMap], *, side: int = 160) -> Tensor:
    """One row a picture: itself, the text's look at it, and its look at the words; below the columns, what their
    colours mean.

    ``pictures`` are uint8 [3, H, W], cut as the model saw them; ``side`` is what they are shown at, in pixels. As wide
    as the words are.
    """
    size = max(WORD, side // 10)
    texts = [_Words(found.words, size) for found in maps]
    heights = [max(side, text.height) for text in texts]
    column = 3 * GAP + 2 * side
    canvas, draw = _canvas(
        column + max(side, *(text.width for text in texts)) + GAP, GAP + sum(heights) + len(maps) * GAP + LINE + GAP
    )
    top = GAP
    for picture, found, text, height in zip(pictures, maps, texts, heights, strict=True):
        canvas.paste(_thumbnail(picture, side), (GAP, top))
        canvas.paste(_thumbnail(overlay(picture, found.patches), side), (2 * GAP + side, top))
        text.draw(draw, column, top + (height - text.height) // 2)
        top += height + GAP
    for left, colours in ((2 * GAP + side, _heat), (column, _ground)):
        _draw_scale(canvas, draw, (left, top), side - GAP, colours)
    return _tensor(canvas)


def draw_words(words: Sequence[tuple[str, float]]) -> Tensor:
    """Words on ground as strong as their weights in 0..1 (darker is more) in lines, and what the ground means."""
    text = _Words(words, WORD)
    canvas, draw = _canvas(2 * GAP + max(SIDE, text.width), 3 * GAP + text.height + LINE)
    text.draw(draw, GAP, GAP)
    _draw_scale(canvas, draw, (GAP, 2 * GAP + text.height), SIDE, _ground)
    return _tensor(canvas)


def class_colours(count: int) -> list[tuple[int, int, int]]:
    """Colours (red, green, blue) to tell classes apart: hues a golden angle apart, in two strengths of light."""
    hues = (hls_to_rgb(0.02 + n * 0.381966, 0.62 - 0.2 * (n % 2), 0.85) for n in range(count))
    return [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in hues]


def draw_classes(picture: Tensor, classes: Tensor) -> Tensor:
    """A picture, uint8 [3, H, W], under the colours of its classes, int64 [H, W]: uint8 [3, H, W]."""
    colours = torch.tensor(class_colours(int(classes.max()) + 1), dtype=torch.float32)
    return picture.float().lerp(colours[classes].permute(2, 0, 1), 0.6).round().to(torch.uint8)


def draw_segments(
    rows: Sequence[tuple[Tensor, Tensor, Sequence[tuple[tuple[int, int, int], str]]]], *, side: int = 160
) -> Tensor:
    """One row a picture: itself, itself under the colours of its classes, and what each colour stands for."""
    texts = [[(colour, _cut(name)) for colour, name in entries] for _, _, entries in rows]
    width = max(_width(name) for entries in texts for _, name in entries)
    heights = [max(side, len(entries) * LINE) for entries in texts]
    column = 3 * GAP + 2 * side
    canvas, draw = _canvas(column + LINE + width + GAP, GAP + sum(heights) + len(rows) * GAP)
    top = GAP
    for (picture, drawn, _), entries, height in zip(rows, texts, heights, strict=True):
        canvas.paste(_thumbnail(picture, side), (GAP, top))
        canvas.paste(_thumbnail(drawn, side), (2 * GAP + side, top))
        for line, (colour, name) in enumerate(entries):
            draw.rectangle((column, top + line * LINE + 3, column + 13, top + line * LINE + 16), fill=colour)
            draw.text((column + LINE, top + line * LINE + 2), name, fill=_INK, font=_font(_FONT))
        top += height + GAP
    return _tensor(canvas)


def overlay(picture: Tensor, weights: Tensor) -> Tensor:
    """A picture, uint8 [3, H, W], under the colours of weights in 0..1 [rows, columns]: uint8 [3, H, W]."""
    from PIL import Image

    height, width = picture.shape[-2:]
    smooth = Image.fromarray(weights.float().numpy()).resize((width, height), Image.Resampling.BILINEAR)
    colours = torch.from_numpy(_heat(np.asarray(smooth, np.float32))).permute(2, 0, 1)
    return picture.float().lerp(colours, 0.55).round().to(torch.uint8)


def heat_colours() -> list[tuple[int, int, int]]:
    """The colours of an overlay, from little to much: a few of them (red, green, blue)."""
    return [(round(red), round(green), round(blue)) for red, green, blue in _HEAT.tolist()]


def _heat(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Colours [..., 3] of weights in 0..1."""
    place = np.clip(weights, 0, 1) * (len(_HEAT) - 1)
    step = np.minimum(place.astype(int), len(_HEAT) - 2)
    part = (place - step.astype(np.float32))[..., None]
    found: NDArray[np.float32] = _HEAT[step] * (1 - part) + _HEAT[step + 1] * part
    return found


def _ground(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """The ground [..., 3] of words of weights in 0..1."""
    return 255 - weights[..., None] * np.array([0, 170, 200], np.float32)


class _Words:
    """Words in lines, each on its ground, in letters of ``size`` pixels."""

    def __init__(self, words: Sequence[tuple[str, float]], size: int) -> None:
        self._size = size
        self._placed: list[tuple[int, int, int, str, float]] = []
        x = y = 0
        for word, weight in words:
            shown = _cut(word, size)
            width = _width(shown, size) + 8
            if x and x + width > _TEXT_WIDTH:
                x, y = 0, y + size + 2 * WORD_GAP
            self._placed.append((x, y, width, shown, weight))
            x += width
        self.height = y + size + WORD_GAP
        self.width = max((x + width for x, _, width, *_ in self._placed), default=0)

    def draw(self, draw: ImageDraw.ImageDraw, left: int, top: int) -> None:
        """Draw them there."""
        for x, y, width, word, weight in self._placed:
            red, green, blue = (round(value) for value in _ground(np.array(weight, np.float32)).tolist())
            box = (left + x, top + y, left + x + width - 2, top + y + self._size + WORD_GAP - 1)
            draw.rectangle(box, fill=(red, green, blue))
            draw.text((left + x + 3, top + y + 1), word, fill=_INK, font=_font(self._size))


def _draw_scale(
    canvas: Image.Image, draw: ImageDraw.ImageDraw, place: tuple[int, int], width: int, colours: Colours
) -> None:
    """The colours from little to much, between these words, ``width`` pixels in all."""
    from PIL import Image

    left, top = place
    ends = [_width(word) + GAP for word in ("little", "much")]
    bar = width - sum(ends)
    strip = np.broadcast_to(colours(np.linspace(0, 1, bar, dtype=np.float32)), (_SCALE, bar, 3))
    draw.text((left, top), "little", fill=_GREY, font=_font(_FONT))
    canvas.paste(Image.fromarray(strip.round().astype(np.uint8)), (left + ends[0], top + 4))
    draw.rectangle((left + ends[0], top + 4, left + ends[0] + bar - 1, top + 3 + _SCALE), outline=_GREY)
    draw.text((left + ends[0] + bar + GAP, top), "much", fill=_GREY, font=_font(_FONT))


def _cut(text: str, size: int = _FONT) -> str:
    """One line of text, cut to the width of the text column."""
    text = " ".join(text.split())[:300]
    while text and _width(text, size) > _TEXT_WIDTH - 8:
        text = text.removesuffix("...")[:-2].rstrip() + "..."
    return text


def _width(text: str, size: int = _FONT) -> int:
    return int(_font(size).getlength(text) + 0.5)


@cache
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


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
