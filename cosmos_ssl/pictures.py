"""Encoded pictures to RGB, in one place for training, evaluation and Python: formats, transparency, depth, size."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_ssl.errors import BadSample

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "MPO")
"""What is decoded, by PIL's names: formats that only hold pixels. EPS, for one, would run a program."""

MAX_PIXELS = 1 << 26
"""Larger pictures are refused before they are decoded."""

BACKGROUND = "white"
"""What transparent pictures are put on (``model.background``), as img2dataset does."""


def open_rgb(source: bytes | Path, *, max_pixels: int = MAX_PIXELS, background: str = BACKGROUND) -> Image.Image:
    """The picture as RGB, on ``background`` (a colour that PIL knows) where it is transparent.

    Raises BadSample where it is of no known format, too large or damaged, OSError where a file cannot be read.
    """
    from PIL import Image

    data = source.read_bytes() if isinstance(source, Path) else source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # corrupt EXIF, decompression bombs: judged below
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                width, height = picture.size
                if width * height > max_pixels:
                    raise BadSample("too large", f"{width}x{height} pixels")
                picture.load()
                return to_rgb(picture, background)
    except BadSample:
        raise
    except Exception as error:  # PIL raises many kinds: OSError, SyntaxError, struct.error, ...
        raise BadSample("undecodable", str(error).partition(" <_io.")[0] or type(error).__name__) from error


def to_rgb(picture: Any, background: str = BACKGROUND) -> Image.Image:
    """A PIL picture of any mode as RGB, on ``background`` where it is transparent; RGB ones are handed on as they are."""
    from PIL import Image

    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture  # type: ignore[no-any-return]  # a needless copy doubles the time
    if not has_alpha(picture):
        return picture.convert("RGB")  # type: ignore[no-any-return]
    clear = picture.convert("RGBA")
    ground = Image.new("RGBA", clear.size, background)
    return Image.alpha_composite(ground, clear).convert("RGB")


def has_alpha(picture: Any) -> bool:
    """Whether a PIL picture can be transparent: an alpha channel, or a transparent colour of its palette."""
    return "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "RGBa", "La")
