"""Encoded pictures to RGB: formats, transparency, depth of grey, limits; what is no file to read."""

from __future__ import annotations

import io
import os
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cosmos_ssl import pictures
from cosmos_ssl.errors import BadSample
from cosmos_ssl.pictures import FORMATS, has_alpha, is_colour, open_picture, open_rgb, read_regular, to_rgb


def encoded(picture: Any, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def colour(mode: str, value: Any) -> Image.Image:
    return Image.new(mode, (4, 3), value)


def palette(**options: Any) -> bytes:
    """Red beside green, as a palette picture."""
    rgb = np.zeros((2, 4, 3), np.uint8)
    rgb[:, :2, 0] = rgb[:, 2:, 1] = 255
    return encoded(Image.fromarray(rgb).convert("P", palette=Image.Palette.ADAPTIVE, colors=2), **options)


def grey(*values: float, dtype: Any = np.uint16) -> Image.Image:
    return Image.fromarray(np.array([values], dtype))


def first_row(body: bytes) -> list[int]:
    """The red of the first row."""
    return np.asarray(open_rgb(body))[0, :, 0].tolist()


# ---------------------------------------------------------------------------- transparency

RED = colour("RGB", "red").convert("P")
CLEAR = {
    "RGBA": encoded(colour("RGBA", (255, 0, 0, 0))),
    "LA": encoded(colour("LA", (0, 0))),
    "RGB with a transparent colour": encoded(colour("RGB", (9, 8, 7)), transparency=(9, 8, 7)),
    "L with a transparent value": encoded(colour("L", 7), transparency=7),
    "16 bits with a transparent value": encoded(grey(300, 300), transparency=300),
    "a transparent entry": encoded(RED, transparency=RED.getpixel((0, 0))),
    "a palette of alphas": palette(transparency=b"\0\0"),
    "GIF": encoded(RED, "GIF", transparency=RED.getpixel((0, 0))),
    "WebP": encoded(colour("RGBA", (0, 0, 0, 0)), "WEBP", lossless=True),
    "TIFF": encoded(colour("RGBA", (9, 9, 9, 0)), "TIFF"),
}


@pytest.mark.parametrize("body", CLEAR.values(), ids=CLEAR.keys())
def test_what_is_transparent_is_put_on_the_background(body: bytes) -> None:
    assert has_alpha(open_picture(body, decode=False))
    for background, wanted in (("white", (255, 255, 255)), ("#1e90ff", (30, 144, 255))):
        picture = open_rgb(body, background=background)
        assert picture.mode == "RGB" and picture.getcolors() == [(picture.width * picture.height, wanted)]


def test_half_transparent_is_mixed() -> None:
    assert np.asarray(open_rgb(encoded(colour("RGBA", (200, 100, 0, 128))))).reshape(-1, 3)[0].tolist() == [
        227,
        177,
        127,
    ]
    some = np.asarray(open_rgb(palette(transparency=b"\xff\0")))  # one of the two colours
    assert sorted({tuple(pixel) for pixel in some.reshape(-1, 3).tolist()} & {(255, 255, 255)}) == [(255, 255, 255)]
    assert len(np.unique(some.reshape(-1, 3), axis=0)) == 2


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "RGB"])
def test_what_is_opaque_is_as_pil_converts_it(mode: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)).convert(mode)
    assert np.array_equal(np.asarray(to_rgb(noise)), np.asarray(noise.convert("RGB")))
    assert mode != "RGB" or to_rgb(noise) is noise, "no copy"


# ---------------------------------------------------------------------------- depth

DEEP = {
    "PNG": (encoded(grey(0, 128, 129, 32896, 65535)), [0, 0, 1, 128, 255]),
    "TIFF": (encoded(grey(0, 128, 129, 32896, 65535), "TIFF"), [0, 0, 1, 128, 255]),
    "big-endian TIFF": (encoded(grey(0, 257, 65535, dtype=">u2"), "TIFF"), [0, 1, 255]),
    "PGM, which PIL widens": (b"P5\n3 1\n65535\n\0\0\0\x81\xff\xff", [0, 1, 255]),
    "PGM of 10 bits": (b"P5\n2 1\n1023\n\2\1\3\xff", [128, 255]),
    "TIFF of 32 bits, 16 used": (encoded(grey(0, 32896, 65535, dtype=np.int32), "TIFF"), [0, 128, 255]),
    "TIFF of 32 bits, 8 used": (encoded(grey(0, 100, 255, dtype=np.int32), "TIFF"), [0, 100, 255]),
    "floats to 1": (encoded(grey(0, 0.5, 1, dtype=np.float32), "TIFF"), [0, 128, 255]),
    "floats to 255": (encoded(grey(0, 99.6, 250, dtype=np.float32), "TIFF"), [0, 100, 250]),
}


@pytest.mark.parametrize(("body", "wanted"), DEEP.values(), ids=DEEP.keys())
def test_deep_grey_is_scaled(body: bytes, wanted: list[int]) -> None:
    assert first_row(body) == wanted


@pytest.mark.parametrize("values", [(-1, 2), (0, 70_000), (0, float("nan"))])
def test_grey_without_a_known_range_is_refused(values: tuple[float, float]) -> None:
    with pytest.raises(BadSample, match="unknown range: values from"):
        to_rgb(grey(*values, dtype=np.float32))


# ---------------------------------------------------------------------------- what is refused


def test_other_formats_are_not_opened() -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS", "PIL would hand it to Ghostscript"
    for body in (eps, encoded(colour("RGB", 0), "ICO"), b"", b"no picture"):
        with pytest.raises(BadSample, match=r"^undecodable: cannot identify image file$"):
            open_picture(body, decode=False)
    for form in FORMATS:
        assert open_rgb(encoded(colour("RGB", "white"), form)).getpixel((0, 0)) == (255, 255, 255)


def empty_png(width: int, height: int) -> bytes:
    """A PNG of one black pixel whose header tells another size."""
    body = bytearray(encoded(Image.new("L", (1, 1))))
    body[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    body[29:33] = zlib.crc32(body[12:29]).to_bytes(4, "big")
    return bytes(body)


def test_sizes_that_are_refused() -> None:
    with pytest.raises(BadSample, match=r"^too large: 5x4 pixels$"):
        open_picture(encoded(Image.new("L", (5, 4))), max_pixels=19, decode=False)
    assert open_picture(encoded(Image.new("L", (5, 4))), max_pixels=20).size == (5, 4)
    with pytest.raises(BadSample, match=r"^undecodable: "):
        open_picture(empty_png(0, 4), decode=False)


def test_ours_is_the_only_limit(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    large = encoded(Image.new("L", (40, 40)))
    with pytest.raises(BadSample, match="too large"):
        open_picture(large, max_pixels=60)
    assert Image.MAX_IMAGE_PIXELS == 100, "a smaller limit changes nothing for others"
    assert open_picture(large, max_pixels=1600).size == (40, 40)
    assert open_picture(encoded(Image.new("L", (20, 20))), max_pixels=500).size == (20, 20)
    assert Image.MAX_IMAGE_PIXELS == 1600, "it is never lowered"
    assert not recwarn.list


def test_a_cut_picture_is_undecodable() -> None:
    body = encoded(Image.effect_noise((64, 64), 90))
    assert open_picture(body[: len(body) // 2], decode=False).size == (64, 64)
    with pytest.raises(BadSample, match=r"^undecodable: "):
        open_picture(body[: len(body) // 2])


def test_what_pil_warns_of_is_not_told() -> None:
    with warnings.catch_warnings(record=True) as told:
        pictures._be_quiet.cache_clear()
        open_rgb(encoded(colour("RGB", 0)))
        warnings.warn_explicit("corrupt", UserWarning, "x", 1, module="PIL.TiffImagePlugin")
        warnings.warn_explicit("theirs", UserWarning, "x", 1, module="mine")
    assert [str(one.message) for one in told] == ["theirs"]


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    body = encoded(colour("RGB", "red"))
    (tmp_path / "a.png").write_bytes(body)
    (tmp_path / "link.png").symlink_to("a.png")
    assert read_regular(tmp_path / "link.png") == body and open_rgb(tmp_path / "a.png").getpixel((0, 0)) == (255, 0, 0)
    os.mkfifo(tmp_path / "pipe.png")
    for odd in (tmp_path / "pipe.png", Path("/dev/zero")):
        with pytest.raises(BadSample, match=r"^no regular file$"):
            read_regular(odd)
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path)
    with (tmp_path / "vast.png").open("wb") as file:
        file.truncate((1 << 30) + 1)  # a hole: it takes no room
    with pytest.raises(BadSample, match=r"^too large: 1,073,741,825 bytes$"):
        read_regular(tmp_path / "vast.png")


def test_colours() -> None:
    assert all(map(is_colour, ("white", "#fff", "#1e90ff", "rgb(1, 2, 3)", "hsl(0, 100%, 50%)")))
    assert not any(map(is_colour, ("", "wihte", "#12", "#11223344", "rgba(1, 2, 3, 4)")))
