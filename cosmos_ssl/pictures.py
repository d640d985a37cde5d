"""Encoded pictures to RGB, in one place for training, evaluation and Python: formats, size, transparency, depth."""

from __future__ import annotations

import io
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_ssl.errors import BadSample

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
"""What is decoded, by PIL's names: formats that only hold pixels. EPS, for one, would run a program."""

MAX_PIXELS = 1 << 26
"""Larger pictures are refused before they are decoded."""

FILE_BYTES = 1 << 30
"""Larger files are no pictures to train on."""

BACKGROUND = "white"
"""What transparent pictures are put on (``model.background``), as img2dataset does."""

_lock = threading.Lock()


def read_regular(path: Path) -> bytes:
    """The bytes of a file.

    Raises BadSample for a pipe or a device, which might never end, and for a file that is too large; OSError.
    """
    # a pipe would be waited for until someone writes into it
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise BadSample("no regular file")
        if found.st_size > FILE_BYTES:
            raise BadSample("too large", f"{found.st_size:,} bytes")
        return file.read()


@contextmanager
def undecodable() -> Iterator[None]:
    """Whatever PIL raises becomes BadSample."""
    try:
        yield
    except BadSample:
        raise
    except Exception as error:  # PIL raises many kinds: OSError, SyntaxError, struct.error, ...
        bomb = type(error).__name__.startswith("DecompressionBomb")
        said = str(error).partition(" <_io.")[0] or type(error).__name__
        raise BadSample("too large" if bomb else "undecodable", said) from error


def open_picture(data: bytes, *, max_pixels: int = MAX_PIXELS, decode: bool = True) -> Image.Image:
    """The picture as it is encoded, in any of PIL's modes; without ``decode`` its header alone has been read.

    Raises BadSample where it is of none of ``FORMATS``, has no pixels or more than ``max_pixels``, or is damaged.
    """
    from PIL import Image

    _be_quiet()
    _admit(max_pixels)
    with undecodable():
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = picture.size
        if not 0 < width * height <= max_pixels:
            raise BadSample("too large" if width * height else "undecodable", f"{width}x{height} pixels")
        if decode:
            picture.load()
        return picture


@cache
def _be_quiet() -> None:
    """What PIL warns of (odd EXIF blocks, pictures larger than it likes) is judged here.

    Once: ``catch_warnings`` is not for threads.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _admit(max_pixels: int) -> None:
    """Ours is the only limit: where it is above PIL's, a global of the process, that one is raised to it and never
    lowered.
    """
    from PIL import Image

    if (Image.MAX_IMAGE_PIXELS or max_pixels) < max_pixels:
        with _lock:
            Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or max_pixels, max_pixels)


def open_rgb(source: bytes | Path, *, max_pixels: int = MAX_PIXELS, background: str = BACKGROUND) -> Image.Image:
    """The picture as RGB, on ``background`` (a colour that PIL knows) where it is transparent.

    Raises BadSample as ``open_picture`` and ``read_regular`` do, OSError where a file cannot be read.
    """
    data = read_regular(source) if isinstance(source, Path) else source
    return to_rgb(open_picture(data, max_pixels=max_pixels), background)


def to_rgb(picture: Any, background: str = BACKGROUND) -> Image.Image:
    """A PIL picture of any mode as RGB, on ``background`` where it is transparent; RGB ones are handed on as they are.

    Raises BadSample for a mode that cannot become RGB.
    """
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture  # type: ignore[no-any-return]  # a needless copy doubles the time
    from PIL import Image

    with undecodable():
        if picture.mode[0] in "IF":
            picture = _eight_bits(picture)
        if not has_alpha(picture):
            return picture.convert("RGB")  # type: ignore[no-any-return]
        clear = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", clear.size, background), clear).convert("RGB")


def _eight_bits(picture: Any) -> Image.Image:
    """Grey of 16 or 32 bits, or of floats, as 8 bits: of mode L, or LA with a transparent value.

    Values of 16 bits reach to 65,535, also where PIL widens them to 32. Others tell no range: the least of 1 (floats),
    255 and 65,535 that holds them all is taken for white. Raises BadSample where none does.
    """
    import numpy as np
    from PIL import Image

    values = np.asarray(picture)
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        white: int | None = 65_535
    else:
        ranges = (1, 255, 65_535) if picture.mode == "F" else (255, 65_535)
        white = next((most for most in ranges if values.min() >= 0 and values.max() <= most), None)
    if white is None:
        raise BadSample("unknown range", f"values from {values.min():g} to {values.max():g}")
    grey = Image.fromarray(np.rint(values * np.float32(255 / white)).astype(np.uint8))
    if "transparency" in picture.info:
        grey.putalpha(Image.fromarray(np.where(values == picture.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def has_alpha(picture: Any) -> bool:
    """Return whether a PIL picture can be transparent: an alpha channel, or a transparent colour of its palette."""
    return "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "RGBa")


def is_colour(name: str) -> bool:
    """Return whether PIL knows this opaque colour, such as ``white`` or ``#ffa500``."""
    from PIL import ImageColor

    try:
        return len(ImageColor.getrgb(name)) == 3
    except ValueError:
        return False
