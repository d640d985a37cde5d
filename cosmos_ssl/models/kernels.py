"""Triton kernels of ``fused``: products that end in GELU or its gradient, residual sums with LayerNorm.

Sums are in float32 and in a fixed order: of rows by blocks, which ``column_sums`` adds. Imported where they run alone.
"""

# mypy: ignore-errors
# ruff: noqa: N803
# Triton's language has no types that a checker knows, and constants of a kernel are written as such.

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl

TILE, DEPTH = 128, 64
"""Rows and columns of a product that a program makes; of its sum, taken at a time (96 KiB in three stages)."""
_ROWS = 4
"""Of a reduction, taken at a time."""


@triton.jit
def _place(m, n, TILE: tl.constexpr):
    """The tile of a program: eight blocks of rows go through the columns together, so that caches have both."""
    down, across = tl.cdiv(m, TILE), tl.cdiv(n, TILE)
    number = tl.program_id(0)
    first = number // (8 * across) * 8
    height = tl.minimum(down - first, 8)
    inside = number % (8 * across)
    return first + inside % height, inside // height


@triton.jit
def _product(a, b, row, column, m, n, k_, along, across, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """A tile of ``a`` [m, k] times ``b`` [k, n], whose strides are ``along`` and ``across``, in float32."""
    rows = row * TILE + tl.arange(0, TILE)
    columns = column * TILE + tl.arange(0, TILE)
    depth = tl.arange(0, DEPTH)
    left = a + rows.to(tl.int64)[:, None] * k_ + depth[None, :]
    right = b + depth[:, None] * along + columns[None, :] * across
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, k_, DEPTH):
        inside = depth < k_ - start
        x = tl.load(left, (rows < m)[:, None] & inside[None, :], 0.0)
        y = tl.load(right, inside[:, None] & (columns < n)[None, :], 0.0)
        total = tl.dot(x, y, total)
        left += DEPTH
        right += DEPTH * along
    return total


@triton.jit
def _normal(x):
    """The share of a normal distribution below ``x``: GELU is x times it."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _linear_gelu(
    x, weight, bias, hidden, active, m, n, k_, KEEP: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr
):
    row, column = _place(m, n, TILE)
    total = _product(x, weight, row, column, m, n, k_, 1, k_, TILE, DEPTH)
    rows = row * TILE + tl.arange(0, TILE)
    columns = column * TILE + tl.arange(0, TILE)
    total += tl.load(bias + columns, columns < n, 0.0).to(tl.float32)[None, :]
    places = rows.to(tl.int64)[:, None] * n + columns[None, :]
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    narrow = total.to(active.dtype.element_ty)
    if KEEP:
        tl.store(hidden + places, narrow, inside)
    wide = narrow.to(tl.float32)
    tl.store(active + places, (wide * _normal(wide)).to(active.dtype.element_ty), inside)


@triton.jit
def _gelu_grad(grad, weight, hidden, out, active, sums, m, n, k_, TILE: tl.constexpr, DEPTH: tl.constexpr):
    row, column = _place(m, n, TILE)
    total = _product(grad, weight, row, column, m, n, k_, n, 1, TILE, DEPTH)
    rows = row * TILE + tl.arange(0, TILE)
    columns = column * TILE + tl.arange(0, TILE)
    places = rows.to(tl.int64)[:, None] * n + columns[None, :]
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    x = tl.load(hidden + places, inside, 0.0).to(tl.float32)
    share = _normal(x)
    tl.store(active + places, (x * share).to(active.dtype.element_ty), inside)
    narrow = (total * (share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x))).to(out.dtype.element_ty)
    tl.store(out + places, narrow, inside)
    tl.store(sums + row * n + columns, tl.sum(narrow.to(tl.float32), 0), columns < n)


@triton.jit
def _add_norm(
    x, branch, bias, weight, shift, total, normed, means, scales, w, eps,
    BRANCH: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDE)
    inside = columns < w
    value = tl.load(x + row * w + columns, inside, 0.0).to(tl.float32)
    if BRANCH:
        value += tl.load(branch + row * w + columns, inside, 0.0).to(tl.float32)
        if BIAS:
            value += tl.load(bias + columns, inside, 0.0).to(tl.float32)
        narrow = value.to(total.dtype.element_ty)
        tl.store(total + row * w + columns, narrow, inside)
        value = narrow.to(tl.float32)
    mean = tl.sum(value, 0) / w
    centred = tl.where(inside, value - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / w + eps)
    tl.store(means + row, mean)
    tl.store(scales + row, scale)
    gain = tl.load(weight + columns, inside, 0.0).to(tl.float32)
    offset = tl.load(shift + columns, inside, 0.0).to(tl.float32)
    tl.store(normed + row * w + columns, (centred * scale * gain + offset).to(normed.dtype.element_ty), inside)


@triton.jit
def _add_norm_grad(
    grad, through, total, means, scales, weight, out, sums, m, w, share,
    THROUGH: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, WIDE)
    inside = columns < w
    gain = tl.load(weight + columns, inside, 0.0).to(tl.float32)
    gains, shifts, biases = (
        tl.zeros((WIDE,), tl.float32),
        tl.zeros((WIDE,), tl.float32),
        tl.zeros((WIDE,), tl.float32),
    )
    first = tl.program_id(0) * share
    for start in range(first, tl.minimum(first + share, m), ROWS):
        rows = start + tl.arange(0, ROWS)
        held = rows < tl.minimum(first + share, m)
        places = rows.to(tl.int64)[:, None] * w + columns[None, :]
        mask = held[:, None] & inside[None, :]
        given = tl.load(grad + places, mask, 0.0).to(tl.float32)
        value = tl.load(total + places, mask, 0.0).to(tl.float32)
        mean = tl.load(means + rows, held, 0.0)[:, None]
        scale = tl.load(scales + rows, held, 0.0)[:, None]
        unit = tl.where(mask, (value - mean) * scale, 0.0)
        gains += tl.sum(given * unit, 0)
        shifts += tl.sum(given, 0)
        scaled = given * gain[None, :]
        found = (scaled - tl.sum(scaled, 1)[:, None] / w - unit * (tl.sum(scaled * unit, 1)[:, None] / w)) * scale
        if THROUGH:
            found += tl.load(through + places, mask, 0.0).to(tl.float32)
        narrow = found.to(out.dtype.element_ty)
        tl.store(out + places, narrow, mask)
        biases += tl.sum(tl.where(mask, narrow.to(tl.float32), 0.0), 0)
    place = sums + tl.program_id(0) * 3 * w + columns
    tl.store(place, gains, inside)
    tl.store(place + w, shifts, inside)
    tl.store(place + 2 * w, biases, inside)


@triton.jit
def _stack(q, k, v, out, sums, m, w, q_row, k_row, v_row, share, ROWS: tl.constexpr, WIDE: tl.constexpr):
    part = tl.program_id(1)
    source, stride = q, q_row
    if part == 1:
        source, stride = k, k_row
    if part == 2:
        source, stride = v, v_row
    columns = tl.arange(0, WIDE)
    total = tl.zeros((WIDE,), tl.float32)
    first = tl.program_id(0) * share
    for start in range(first, tl.minimum(first + share, m), ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < tl.minimum(first + share, m))[:, None] & (columns < w)[None, :]
        value = tl.load(source + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask, 0.0)
        tl.store(out + rows.to(tl.int64)[:, None] * (3 * w) + part * w + columns[None, :], value, mask)
        total += tl.sum(value.to(tl.float32), 0)
    tl.store(sums + (tl.program_id(0) * 3 + part) * w + columns, total, columns < w)


@triton.jit
def _column_sums(first, second, out, p, q_, n1, n2, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tile, tiles = tl.program_id(0), tl.cdiv(n1, COLUMNS)
    sums, m, n = first, p, n1
    if tile >= tiles:
        sums, m, n = second, q_, n2
        tile -= tiles
        out += n1
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, m, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < m)[:, None] & (columns < n)[None, :]
        total += tl.sum(tl.load(sums + rows[:, None] * n + columns[None, :], mask, 0.0), 0)
    tl.store(out + columns, total.to(out.dtype.element_ty), columns < n)


# ---------------------------------------------------------------------------- launches


def _launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **kwargs: Any) -> None:
    """On the tensors' own device, which need not be the current one."""
    with torch.cuda.device(device if device.type == "cuda" else -1):  # -1 changes nothing
        kernel[grid](*args, **kwargs, enable_fp_fusion=True)


def _tiles(m: int, n: int) -> tuple[int]:
    return (triton.cdiv(m, TILE) * triton.cdiv(n, TILE),)


_PRODUCT = {"TILE": TILE, "DEPTH": DEPTH, "num_warps": 8, "num_stages": 3}


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, hidden: Tensor, active: Tensor) -> None:
    """``hidden`` [M, N], unless it is empty, and ``active`` become x weight^T + bias and its GELU."""
    m, n = active.shape
    keep = bool(hidden.numel())
    size = (m, n, x.shape[1])
    _launch(_linear_gelu, _tiles(m, n), x.device, x, weight, bias, hidden, active, *size, KEEP=keep, **_PRODUCT)


def gelu_grad(grad: Tensor, weight: Tensor, hidden: Tensor, out: Tensor, active: Tensor, sums: Tensor) -> None:
    """``out`` [M, N] becomes (grad weight) GELU'(hidden), ``sums`` its sums by blocks of rows, ``active`` GELU."""
    m, n = hidden.shape
    size = (m, n, grad.shape[1])
    _launch(_gelu_grad, _tiles(m, n), grad.device, grad, weight, hidden, out, active, sums, *size, **_PRODUCT)


def add_norm(
    x: Tensor, branch: Tensor | None, bias: Tensor | None, weight: Tensor, shift: Tensor, eps: float,
    total: Tensor, normed: Tensor, means: Tensor, scales: Tensor,
) -> None:  # fmt: skip
    """``total`` [M, W] becomes x + branch + bias, ``normed`` its LayerNorm; ``means`` and ``scales`` [M] its moments.

    Without a branch it is x, and not written.
    """
    m, width = x.shape
    added = (x if given is None else given for given in (branch, bias))
    given = (x, *added, weight, shift, total, normed, means, scales, width, eps)
    wide, kinds = triton.next_power_of_2(width), {"BRANCH": branch is not None, "BIAS": bias is not None}
    _launch(_add_norm, (m,), x.device, *given, **kinds, WIDE=wide, num_warps=4)


def add_norm_grad(
    grad: Tensor, through: Tensor | None, total: Tensor, means: Tensor, scales: Tensor, weight: Tensor,
    out: Tensor, sums: Tensor,
) -> None:  # fmt: skip
    """``out`` becomes LayerNorm's gradient + ``through``; ``sums`` [P, 3, W] those of weight, shift and bias."""
    m, width = total.shape
    given = (grad, grad if through is None else through, total, means, scales, weight, out, sums, m, width)
    sizes = {"ROWS": _ROWS, "WIDE": triton.next_power_of_2(width), "num_warps": 8}
    share = triton.cdiv(m, len(sums))
    _launch(_add_norm_grad, (len(sums),), grad.device, *given, share, THROUGH=through is not None, **sizes)


def stack(q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor) -> None:
    """``out`` [M, 3 W] becomes q, k and v [M, H, d] side by side, ``sums`` [P, 3 W] its sums by blocks of rows."""
    m, width = len(q), out.shape[1] // 3
    rows = (q.stride(0), k.stride(0), v.stride(0))
    sizes = {"ROWS": _ROWS, "WIDE": triton.next_power_of_2(width), "num_warps": 8}
    _launch(_stack, (len(sums), 3), q.device, q, k, v, out, sums, m, width, *rows, triton.cdiv(m, len(sums)), **sizes)


def column_sums(first: Tensor, second: Tensor, out: Tensor) -> None:
    """``out`` [N + M] becomes the sums of the columns of [P, N] and of [Q, M]."""
    size = (len(first), len(second), first.shape[1], second.shape[1])
    grid = (triton.cdiv(size[2], 32) + triton.cdiv(size[3], 32),)
    _launch(_column_sums, grid, out.device, first, second, out, *size, ROWS=64, COLUMNS=32, num_warps=4)
