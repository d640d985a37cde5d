"""The kernels of photometric work: in Triton's interpreter, compiled for cards, and on one, against the plain code."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cosmos_ssl_plugins.augmenters import photometric as ph
from cosmos_ssl_plugins.augmenters.fused import fused, normalised

MEAN, STD = (0.48, 0.45, 0.40), (0.26, 0.26, 0.27)
CHANGES = ph.Strengths(
    flip=0.5,
    jitter=0.8,
    factors=(0.4, 0.4, 0.2, 0.1),
    grey=0.2,
    blur=0.5,
    blur_radius=(0.1, 2.0),
    solarize=0.3,
    solarize_threshold=128,
)


def views(count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Noise, some of it grey, uint8 [count, 3, height, width], and rows: all orders, blur of several sizes."""
    generator = np.random.default_rng(count)
    pixels = generator.integers(0, 256, (count, 3, height, width), dtype=np.uint8)
    pixels[1::5, :, ::2] = pixels[1::5, :1, ::2]
    rows = ph.Draw([CHANGES] * count)(generator)
    orders = torch.tensor(list(itertools.permutations(range(4))))[:count]
    rows[: len(orders), ph.ORDER : ph.FACTORS] = orders
    rows[:24, ph.JITTER], rows[-1, ph.JITTER] = 1, 0
    rows[0, ph.FLIP], rows[0, ph.BLUR], rows[1:2, ph.BLUR] = 1, 2.3, 1
    return torch.from_numpy(pixels), rows


def table(rows: Tensor) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(ph.table(rows.numpy())), ph._scales(MEAN, STD)


def interpreted() -> None:
    """Compare on the host; runs where Triton interprets (``tests/functional/test_kernels.py``).

    To the last bit: every order, greys, blur of three sizes, rows of several pieces and columns of several.
    """
    from cosmos_ssl_plugins.augmenters.kernels import COLUMNS

    assert table(views(1, 1, 1)[1])[0].shape[1] == COLUMNS.value
    for size in ((26, 5, 9), (1, 3, 258), (1, 35, 33)):
        pixels, rows = views(*size)
        rows[2:24, ph.BLUR] = 0  # takes long here
        expected = ph.finish(pixels, rows, MEAN, STD)
        torch.testing.assert_close(fused(pixels, *table(rows)), expected, rtol=0, atol=0)
    rows = torch.zeros(len(pixels), ph.COLUMNS).index_fill_(1, torch.tensor(ph.SOLARIZE), 256)
    same = normalised(pixels, *table(rows))
    torch.testing.assert_close(same, ph.standardise(pixels, MEAN, STD), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["levels_kernel", "rows_kernel", "columns_kernel"])
def test_kernels_compile_for_a_card(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For an H100, without one: no product is joined with a sum, and registers suffice."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from cosmos_ssl_plugins.augmenters import kernels

    kernel = getattr(kernels, name)
    constants = {"CHUNK": 8192, "BLOCK": 1024, "CHUNKS": 8, "ROWS": 32, "COLS": 32}
    types = dict.fromkeys(("pixels", "made", "spare", "other"), "*u8")
    types |= dict.fromkeys(("plane", "height", "width", "chunks"), "i32") | {"sums": "*i32"}
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "*fp32") for arg in kernel.arg_names}
    used = {arg: value for arg, value in constants.items() if arg in signature}
    source = ASTSource(fn=kernel, signature=signature, constexprs=used)
    made = compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    assert "fma.rn.f32" not in made.asm["ptx"] and ".local" not in made.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("size", [(128, 224, 224), (384, 96, 96), (40, 37, 301)])
def test_a_card_makes_the_same(size: tuple[int, int, int]) -> None:
    """At the sizes of training; and a view by itself as in a batch."""
    pixels, rows = views(*size)
    made = fused(pixels.cuda(), *(each.cuda() for each in table(rows)))
    torch.testing.assert_close(made.cpu(), ph.finish(pixels, rows, MEAN, STD), rtol=0, atol=2e-6)
    assert torch.equal(ph.finish(pixels[5:6].cuda(), rows[5:6], MEAN, STD), made[5:6])


if __name__ == "__main__":
    interpreted()
