"""``cosmos-ssl attend``: pictures of where words look in a picture, and the picture in words; zero-shot segmentation."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_ssl.cli.checkpoint import add_checkpoint, load_checkpoint
from cosmos_ssl.errors import EXIT_DONE, UserError
from cosmos_ssl.files import storage_faults, written_whole

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from cosmos_ssl.evaluation.attention_maps import AttentionMap
    from cosmos_ssl.evaluation.page import Page
    from cosmos_ssl.models.encoder import ModelEncoder

_SIDE = 448  # pixels of a drawn picture, whatever the model's own size is
_GRID_SIDE = 224
_BATCH = 32


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "attend",
        help="pictures of where words look in a picture, and the picture in words",
        description="Overlays, a grid and an HTML page of what the cross-attention heads look at, and of zero-shot segmentation.",
    )
    add_checkpoint(parser)
    parser.add_argument("--image", nargs="+", required=True, type=Path, metavar="I", help="picture files")
    parser.add_argument(
        "--text", action="append", default=[], metavar="T", help="a text for each picture, or one for all; repeat the flag for several"
    )
    parser.add_argument("--all-pairs", action="store_true", help="every picture with every text")
    parser.add_argument("--segment", metavar="A,B,...", help="class names: colour each place by the one that it is nearest to")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where index.html, grid.png and the overlays go")
    parser.set_defaults(run=_attend)


@dataclass(frozen=True, slots=True)
class _Picture:
    """A picture of a pair: its name, the model's input [3, H, W], and the same cut to be looked at, uint8 [3, side, side]."""

    name: str
    pixels: Tensor
    shown: Tensor


def _attend(arguments: argparse.Namespace) -> int:
    names = _class_names(arguments.segment)
    if not arguments.text and not names:
        raise UserError("--text or --segment: give at least one text, or class names such as --segment 'cat,grass,sky'")
    pairs = pair(len(arguments.image), len(arguments.text), all_pairs=arguments.all_pairs) if arguments.text else []
    opened = _opened(arguments.image)
    encoder, checkpoint = load_checkpoint(arguments)
    if pairs:
        _check_heads(encoder, checkpoint)
    from cosmos_ssl.evaluation.page import Page

    page = Page("Attention" if pairs else "Segmentation", f"{checkpoint}, {arguments.which}")
    with storage_faults(f"--output {arguments.output}: cannot be written"):
        arguments.output.mkdir(parents=True, exist_ok=True)
        if pairs:
            pictures = _prepared(encoder, opened)
            told = [(pictures[image], arguments.text[text]) for image, text in pairs]
            _draw_attention(encoder, told, arguments.output, page)
        if names:
            _draw_segments(encoder, opened, names, arguments.output, page)
        page.write(arguments.output / "index.html")
    print(arguments.output / "index.html")
    return EXIT_DONE


def pair(images: int, texts: int, *, all_pairs: bool = False) -> list[tuple[int, int]]:
    """Which picture goes with which text: one for each, one for all, or all with all. Raises UserError for other numbers."""
    if all_pairs or images == 1 or texts == 1:
        return [(image, text) for image in range(images) for text in range(texts)]
    if images != texts:
        raise UserError(f"--text: {texts} texts for {images} pictures. Give one for each, one for all, or --all-pairs")
    return [(n, n) for n in range(images)]


def _class_names(given: str | None) -> list[str]:
    names = [name.strip() for name in (given or "").split(",") if name.strip()]
    if given is not None and len(names) < 2:
        raise UserError(f"--segment '{given}': name at least two classes, such as 'cat,grass,sky'")
    return names


def _opened(paths: Sequence[Path]) -> list[tuple[str, Image.Image]]:
    """The pictures, decoded. Raises UserError with all those that cannot be."""
    from PIL import Image

    opened, faults = [], []
    for path in paths:
        try:
            with Image.open(path) as image:
                opened.append((path.name, image.convert("RGB")))
        except IsADirectoryError:
            faults.append(f"--image {path}: a folder; name picture files, such as {path}/*.jpg")
        except FileNotFoundError:
            faults.append(f"--image {path}: there is no such file")
        except Exception as error:  # PIL raises many kinds: OSError, SyntaxError, struct.error, DecompressionBombError, ...
            faults.append(f"--image {path}: no picture that can be read ({str(error).partition(' <_io.')[0] or type(error).__name__})")
    if faults:
        raise UserError("\n".join(faults))
    return opened


def _check_heads(encoder: ModelEncoder, checkpoint: str) -> None:
    from cosmos_ssl.evaluation.attention_maps import has_attention

    if not has_attention(encoder):
        raise UserError(
            f"{checkpoint} has no cross-attention head, so no text looks at a picture in it. --segment works without one; --text does not"
        )


def _prepared(encoder: ModelEncoder, opened: Sequence[tuple[str, Image.Image]]) -> list[_Picture]:
    from cosmos_ssl.models.encoder import resize_crop

    return [_Picture(name, encoder.preprocess(image), resize_crop(image, _SIDE)) for name, image in opened]


def _draw_attention(encoder: ModelEncoder, pairs: Sequence[tuple[_Picture, str]], folder: Path, page: Page) -> None:
    """An overlay and the words of each pair as PNG and on the page, and a grid of all."""
    import torch

    from cosmos_ssl.evaluation.attention_maps import attention_maps
    from cosmos_ssl.evaluation.pictures import draw_attention, draw_words, overlay

    maps: list[AttentionMap] = []
    for start in range(0, len(pairs), _BATCH):
        part = pairs[start : start + _BATCH]
        found = attention_maps(encoder, torch.stack([picture.pixels for picture, _ in part]), [text for _, text in part])
        assert found is not None
        maps += found
    grid = draw_attention([picture.shown for picture, _ in pairs], maps, side=_GRID_SIDE)
    _save(grid, folder / "grid.png")
    page.text("Patches: where the text looks in the picture, from dark (little) to bright. Words: where the picture looks in the text.")
    page.text("Weights of the two cross-attention heads, averaged over their attention heads, each map scaled to 0..1.")
    if len(pairs) > 1:
        page.section("All pairs").figure(grid, "picture, patches, words")
    for number, ((picture, text), found_map) in enumerate(zip(pairs, maps, strict=True), 1):
        over = overlay(picture.shown, found_map.patches)
        stem = f"{number:03d}_{_stem(picture.name)}"
        _save(over, folder / f"{stem}_patches.png")
        _save(draw_words(found_map.words), folder / f"{stem}_words.png")
        page.section(text).figure(picture.shown, picture.name).figure(over, "patches").words(found_map.words, "words")


def _draw_segments(
    encoder: ModelEncoder, opened: Sequence[tuple[str, Image.Image]], names: Sequence[str], folder: Path, page: Page
) -> None:
    """Each whole picture, segmented in windows as data sets are, under the colours of its classes: as PNG and on the page."""
    import torch

    from cosmos_ssl.evaluation.classification import SIMPLE_TEMPLATES, class_vectors
    from cosmos_ssl.evaluation.pictures import class_colours, draw_classes
    from cosmos_ssl.evaluation.segmentation import SegmentationProtocol, model_input, segment

    tower = encoder.spec.image
    if tower is None:
        raise UserError("--segment: this model has no image tower")
    side = tower.image_size
    protocol = SegmentationProtocol(short_side=3 * side // 2, window=side, stride=max(1, side // 2))  # SCLIP's where it is 224
    vectors, owners = class_vectors(encoder, names, SIMPLE_TEMPLATES), torch.arange(len(names), device=encoder.device)
    for number, (name, image) in enumerate(opened, 1):
        shown = _whole(image)
        pixels = model_input(_pixels(image).to(encoder.device), protocol, tower)
        classes = segment(encoder, pixels, vectors, owners, shown.shape[1:], protocol, tower.patch_size).cpu()
        drawn = draw_classes(shown, classes)
        _save(drawn, folder / f"{number:03d}_{_stem(name)}_segments.png")
        shares = (classes.flatten().bincount(minlength=len(names)) / classes.numel()).tolist()
        entries = [(colour, f"{of} ({share:.0%})") for colour, of, share in zip(class_colours(len(names)), names, shares, strict=True)]
        page.section(f"{name}: {', '.join(names)}").figure(shown, name).figure(drawn, "the class that each place is nearest to")
        page.legend(entries)


def _whole(image: Image.Image) -> Tensor:
    """The picture, uint8 [3, H, W], brought to the size of drawn pictures, its longer side to five times that at most."""
    factor = min(_SIDE / min(image.size), 5 * _SIDE / max(image.size))
    width, height = (max(1, round(side * factor)) for side in image.size)
    return _pixels(image.resize((width, height)))


def _pixels(image: Image.Image) -> Tensor:
    import numpy as np
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _stem(name: str) -> str:
    """A file name's stem, of letters that every file system takes."""
    return re.sub(r"[^\w.-]+", "_", Path(name).stem)[:80]


def _save(picture: Tensor, path: Path) -> None:
    from PIL import Image

    with written_whole(path) as file:
        Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
