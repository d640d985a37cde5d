"""Pictures and a page of where words look in pictures, of pictures in words, and of zero-shot segmentation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cosmos_ssl.api import BadSample, UserError
from cosmos_ssl.evaluation.attention_maps import AttentionMap, attention_maps
from cosmos_ssl.evaluation.classification import SIMPLE_TEMPLATES, class_vectors
from cosmos_ssl.evaluation.features import check_finite
from cosmos_ssl.evaluation.page import Page
from cosmos_ssl.evaluation.pictures import (
    class_colours,
    draw_attention,
    draw_classes,
    draw_segments,
    draw_words,
    heat_colours,
    overlay,
)
from cosmos_ssl.evaluation.segmentation import SegmentationProtocol, model_input, segment
from cosmos_ssl.files import storage_faults, written_whole
from cosmos_ssl.models.encoder import ModelEncoder, resize_crop
from cosmos_ssl.pictures import open_picture, read_regular, to_rgb

_SIDE = 448  # pixels of a drawn picture, whatever the model's own size is
_GRID_SIDE = 224
_BATCH = 32


@dataclass(frozen=True, slots=True)
class _Picture:
    """A picture of a pair: its name, the model's input [3, H, W], and the same cut to be looked at, uint8 [3, side,
    side].
    """

    name: str
    pixels: Tensor
    shown: Tensor


def pair(images: int, texts: int, *, all_pairs: bool = False) -> list[tuple[int, int]]:
    """Return which picture goes with which text: one for each, one for all, or all with all.

    Raises UserError for other numbers.
    """
    if all_pairs or images == 1 or texts == 1:
        return [(image, text) for image in range(images) for text in range(texts)]
    if images != texts:
        raise UserError(f"--text: {texts} texts for {images} pictures. Give one for each, one for all, or --all-pairs")
    return [(n, n) for n in range(images)]


def opened_pictures(paths: Sequence[Path]) -> list[tuple[str, Image.Image]]:
    """The pictures, decoded and as yet in their own modes. Raises UserError with all those that cannot be."""
    opened, faults = [], []
    for path in paths:
        try:
            opened.append((path.name, open_picture(read_regular(path))))
        except IsADirectoryError:
            faults.append(f"--image {path}: a folder; name picture files, such as {path}/*.jpg")
        except FileNotFoundError:
            faults.append(f"--image {path}: there is no such file")
        except BadSample as error:
            faults.append(f"--image {path}: no picture that can be read ({error.detail or error.reason})")
        except OSError as error:
            faults.append(f"--image {path}: cannot be read: {error.strerror}")
    if faults:
        raise UserError("\n".join(faults))
    return opened


def draw_page(
    encoder: ModelEncoder,
    opened: Sequence[tuple[str, Image.Image]],
    pairs: Sequence[tuple[int, str]],
    names: Sequence[str],
    folder: Path,
    *,
    subtitle: str,
) -> Path:
    """The page of pictures (by number) with texts, and of all pictures by the classes ``names``; PNG files and
    ``grid.png`` beside it.

    Raises UserError where the folder cannot be written or the model has no such mode, StorageError.
    """
    opened = [(name, to_rgb(image, encoder.spec.background)) for name, image in opened]
    page = Page("Attention" if pairs else "Segmentation", subtitle)
    with storage_faults(f"--output {folder}: cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        if pairs:
            pictures = [_Picture(name, encoder.preprocess(image), resize_crop(image, _SIDE)) for name, image in opened]
            _draw_attention(encoder, [(pictures[number], text) for number, text in pairs], folder, page)
        if names:
            _draw_segments(encoder, opened, names, folder, page, grid="segments_grid.png" if pairs else "grid.png")
        page.write(folder / "index.html")
    return folder / "index.html"


def _draw_attention(encoder: ModelEncoder, pairs: Sequence[tuple[_Picture, str]], folder: Path, page: Page) -> None:
    """An overlay and the words of each pair as PNG and on the page, and a grid of all."""
    maps: list[AttentionMap] = []
    for start in range(0, len(pairs), _BATCH):
        part = pairs[start : start + _BATCH]
        found = attention_maps(
            encoder, torch.stack([picture.pixels for picture, _ in part]), [text for _, text in part]
        )
        assert found is not None
        maps += found
    check_finite(torch.stack([found.patches for found in maps]), "pictures")
    grid = draw_attention([picture.shown for picture, _ in pairs], maps, side=_GRID_SIDE)
    _save(grid, folder / "grid.png")
    page.text(
        "Patches: where the text looks in the picture. Words: where the picture looks in the text, darker is more."
    )
    page.text("Weights of the two cross-attention heads, averaged over their attention heads, each map scaled to 0..1.")
    few, *between, much = heat_colours()
    page.legend([(few, "little"), *((colour, "") for colour in between), (much, "much")])
    if len(pairs) > 1:
        page.section("All pairs").figure(grid, "picture, patches, words")
    for number, ((picture, text), found_map) in enumerate(zip(pairs, maps, strict=True), 1):
        over = overlay(picture.shown, found_map.patches)
        stem = f"{number:03d}_{_stem(picture.name)}"
        _save(over, folder / f"{stem}_patches.png")
        _save(draw_words(found_map.words), folder / f"{stem}_words.png")
        page.section(text).figure(picture.shown, picture.name).figure(over, "patches").words(found_map.words, "words")


def _draw_segments(
    encoder: ModelEncoder,
    opened: Sequence[tuple[str, Image.Image]],
    names: Sequence[str],
    folder: Path,
    page: Page,
    *,
    grid: str,
) -> None:
    """Each whole picture, segmented in windows as data sets are, under the colours of its classes: as PNG and on the
    page, and a grid.
    """
    tower = encoder.spec.image
    if tower is None:
        raise UserError("--segment: this model has no image tower")
    side = tower.image_size
    protocol = SegmentationProtocol(
        short_side=3 * side // 2, window=side, stride=max(1, side // 2)
    )  # SCLIP's where it is 224
    vectors, owners = class_vectors(encoder, names, SIMPLE_TEMPLATES), torch.arange(len(names), device=encoder.device)
    rows = []
    for number, (name, image) in enumerate(opened, 1):
        shown = _whole(image)
        pixels = model_input(_pixels(image).to(encoder.device), protocol, tower)
        classes = segment(encoder, pixels, vectors, owners, shown.shape[1:], protocol, tower.patch_size).cpu()
        drawn = draw_classes(shown, classes)
        _save(drawn, folder / f"{number:03d}_{_stem(name)}_segments.png")
        shares = (classes.flatten().bincount(minlength=len(names)) / classes.numel()).tolist()
        entries = [
            (colour, f"{of} ({share:.0%})")
            for colour, of, share in zip(class_colours(len(names)), names, shares, strict=True)
        ]
        page.section(f"{name}: {', '.join(names)}").figure(shown, name).figure(
            drawn, "the class that each place is nearest to"
        )
        page.legend(entries)
        rows.append((shown, drawn, entries))
    _save(draw_segments(rows, side=_GRID_SIDE), folder / grid)


def _whole(image: Image.Image) -> Tensor:
    """The picture, uint8 [3, H, W], brought to the size of drawn pictures, its longer side to five times that at
    most.
    """
    factor = min(_SIDE / min(image.size), 5 * _SIDE / max(image.size))
    width, height = (max(1, round(side * factor)) for side in image.size)
    return _pixels(image.resize((width, height)))


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _stem(name: str) -> str:
    """A file name's stem, of letters that every file system takes."""
    return re.sub(r"[^\w.-]+", "_", Path(name).stem)[:80]


def _save(picture: Tensor, path: Path) -> None:
    with written_whole(path) as file:
        Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
