"""Photometric work on CUDA: three launches, as operations that PyTorch can trace and count.

N views, 3 channels, H x W pixels; ``table`` float32 [N, kernels.COLUMNS] says what happens to each view, and
``scales`` [2, 3] how its channels are normalised.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from cosmos_ssl.functional.kernels import Kernels

_CHUNK, _BLOCK = 1 << 13, 1 << 10
"""Pixels whose grey one program sums up; pixels at once."""
_COLUMNS = 32
"""Pixels of a row that one program blurs along the columns: a sector of the cache."""
_TRIAL = (((1, 3, 8, 8), torch.uint8), ((1, 28), torch.float32), ((2, 3), torch.float32))
"""Shapes and dtypes of what ``fused`` takes."""


def fused(pixels: Tensor, table: Tensor, scales: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] -> float32 of the same shape, changed and normalised."""
    pixels = pixels.contiguous()
    return normalised(_rows(pixels, table, _levels(pixels, table)), table, scales)


def normalised(pixels: Tensor, table: Tensor, scales: Tensor) -> Tensor:
    """The last of the three launches alone: no flip, jitter or grey."""
    out: Tensor = _columns(pixels.contiguous(), table, scales)
    return out


def _try(device: torch.device, _: torch.dtype) -> None:
    fused(*(torch.zeros(size, device=device, dtype=dtype) for size, dtype in _TRIAL))


KERNELS = Kernels("photometric work", _try)


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()


@torch.library.custom_op("cosmos_ssl::photometric_levels", mutates_args=())
def _levels(pixels: Tensor, table: Tensor) -> Tensor:
    """Sums of grey by chunks of a view, int32 [N, chunks], unset where contrast stays."""
    from cosmos_ssl_plugins.augmenters.kernels import levels_kernel

    sums: Tensor = _levels_like(pixels, table)
    plane = pixels.shape[2] * pixels.shape[3]
    levels_kernel[tuple(sums.shape)](pixels, table, sums, plane, CHUNK=_CHUNK, BLOCK=_BLOCK, enable_fp_fusion=False)
    return sums


@_levels.register_fake
def _levels_like(pixels: Tensor, table: Tensor) -> Tensor:
    chunks = -(-pixels.shape[2] * pixels.shape[3] // _CHUNK)
    return pixels.new_empty(len(pixels), chunks, dtype=torch.int32)


@torch.library.custom_op("cosmos_ssl::photometric_rows", mutates_args=())
def _rows(pixels: Tensor, table: Tensor, sums: Tensor) -> Tensor:
    """Views after all but blur along the columns, solarising and normalising: uint8 [N, 3, H, W]."""
    from cosmos_ssl_plugins.augmenters.kernels import rows_kernel

    (height, width), chunks = pixels.shape[2:], sums.shape[1]
    columns = min(256, _power(width))
    rows = _BLOCK // columns
    made, spare = torch.empty_like(pixels), torch.empty_like(pixels)
    rows_kernel[len(pixels), -(-height // rows)](
        pixels, table, sums, spare, made, height, width, chunks,
        CHUNKS=_power(chunks), ROWS=rows, COLS=columns, enable_fp_fusion=False,
    )  # fmt: skip
    return made


@_rows.register_fake
def _rows_like(pixels: Tensor, table: Tensor, sums: Tensor) -> Tensor:
    return torch.empty_like(pixels)


@torch.library.custom_op("cosmos_ssl::photometric_columns", mutates_args=())
def _columns(made: Tensor, table: Tensor, scales: Tensor) -> Tensor:
    """Finish what ``_rows`` made: float32 [N, 3, H, W]."""
    from cosmos_ssl_plugins.augmenters.kernels import columns_kernel

    height, width = made.shape[2:]
    out: Tensor = _columns_like(made, table, scales)
    spare, other = torch.empty_like(made), torch.empty_like(made)
    columns_kernel[len(made), 3, -(-width // _COLUMNS)](
        made, table, scales, spare, other, out, height, width,
        ROWS=_BLOCK // _COLUMNS, COLS=_COLUMNS, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@_columns.register_fake
def _columns_like(made: Tensor, table: Tensor, scales: Tensor) -> Tensor:
    return torch.empty_like(made, dtype=torch.float32)


for _operation in ("levels", "rows", "columns"):  # no products of matrices
    register_flop_formula(getattr(torch.ops.cosmos_ssl, f"photometric_{_operation}"))(lambda *_, **__: 0)
