"""Triton kernels of ``fused``: what ``photometric`` does to views, to the same bits in three launches.

Views are uint8 [N, 3, H, W] in memory, floats inside, every product and sum rounded by itself: launched with
``enable_fp_fusion=False``. A program has one view, and branches on what happens to it alone. What programs write
between the passes of a blur they read themselves: barriers keep it in order, caches keep it near.
"""

# mypy: ignore-errors
# ruff: noqa: N803
# Triton's language has no types that a checker knows; names of constants are in capitals.

from __future__ import annotations

import triton
import triton.language as tl

FLIP, STOP, HUE, LEVEL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
PURE, GREY, INNER, EDGE = tl.constexpr(4), tl.constexpr(7), tl.constexpr(8), tl.constexpr(9)
SHARE, SOLARIZE, TONES, COLUMNS = tl.constexpr(10), tl.constexpr(11), tl.constexpr(12), tl.constexpr(28)
"""Columns of ``photometric.table``."""
TIE, BYTE = tl.constexpr(2.0**-12), tl.constexpr(255.999 / 255)
"""As in ``photometric``."""
WHOLE = tl.constexpr(1.5 * 2**23)
"""A float this large has no fraction: adding it rounds to even."""


@triton.jit
def _round(x):
    return (x + WHOLE) - WHOLE


@triton.jit
def _luma(r, g, b):
    return (2989 * r.to(tl.int32) + 5870 * g.to(tl.int32) + 1140 * b.to(tl.int32)) // 10000


@triton.jit
def _cut(x):
    return tl.floor(tl.minimum(tl.maximum(x, 0.0), 255.0))


@triton.jit
def _hued(turn, scale, base):
    away = tl.abs(turn - _round(turn))
    return tl.floor(tl.minimum(tl.maximum(away, 1 / 6), 1 / 3) * scale + base)


@triton.jit
def _turned(r, g, b, pure):
    high = tl.maximum(tl.maximum(r, g), b)
    span = high - tl.minimum(tl.minimum(r, g), b)
    turn = tl.where(r == high, g - b, tl.where(g == high, b - r + 2 * span, r - g + 4 * span))
    turn = tl.div_rn(turn, tl.maximum(span, 1.0) * 6)
    scale, base = span * (-6 * BYTE), (high + span) * BYTE + TIE
    r = _hued(turn + tl.load(pure), scale, base)
    g = _hued(turn + tl.load(pure + 1), scale, base)
    b = _hued(turn + tl.load(pure + 2), scale, base)
    return r, g, b


@triton.jit
def _jittered(r, g, b, row, stop, level):
    """The colours after the first ``stop`` turns; ``level`` is the mean grey where contrast is changed."""
    hue = tl.load(row + HUE).to(tl.int32)
    for turn in range(stop):
        if turn == hue:
            r, g, b = _turned(r, g, b, row + PURE)
        else:
            values = row + TONES + 4 * turn
            kept = tl.load(values)
            tie = _luma(r, g, b).to(tl.float32) * tl.load(values + 1) + (
                level * tl.load(values + 2) + tl.load(values + 3)
            )
            r, g, b = _cut(r * kept + tie), _cut(g * kept + tie), _cut(b * kept + tie)
    return r, g, b


@triton.jit
def _colours(source, at, inside, plane):
    r = tl.load(source + at, mask=inside, other=0).to(tl.float32)
    g = tl.load(source + plane + at, mask=inside, other=0).to(tl.float32)
    b = tl.load(source + 2 * plane + at, mask=inside, other=0).to(tl.float32)
    return r, g, b


@triton.jit
def levels_kernel(pixels, table, sums, plane, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of grey where a view's contrast is changed, int32 [N, chunks]."""
    view, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = table + view * COLUMNS
    stop = tl.load(row + LEVEL).to(tl.int32)
    if stop >= 0:
        total = tl.zeros((BLOCK,), tl.int32)
        for start in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, plane), BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < plane
            r, g, b = _colours(pixels + view * 3 * plane, at, inside, plane)
            r, g, b = _jittered(r, g, b, row, stop, 0.0)
            total += tl.where(inside, _luma(r, g, b), 0)
        tl.store(sums + view * tl.num_programs(1) + chunk, tl.sum(total))


@triton.jit
def _box(source, lines, place, step, inside, last, row):
    """Whole mean over the box around each ``place`` of ``lines``, whose pixels lie ``step`` apart; edges repeated."""
    inner = tl.load(row + INNER).to(tl.int32)
    low = tl.load(source + lines + tl.maximum(place - inner - 1, 0) * step, mask=inside, other=0)
    high = tl.load(source + lines + tl.minimum(place + inner + 1, last) * step, mask=inside, other=0)
    total = (low.to(tl.float32) + high.to(tl.float32)) * tl.load(row + EDGE)
    for shift in range(-inner, inner + 1):
        at = tl.minimum(tl.maximum(place + shift, 0), last)
        total += tl.load(source + lines + at * step, mask=inside, other=0).to(tl.float32)
    return _round(total * tl.load(row + SHARE))


@triton.jit
def _blur_rows(source, target, top, height, width, row, ROWS: tl.constexpr, COLS: tl.constexpr):
    tl.debug_barrier()
    y = top + tl.arange(0, ROWS)[:, None]
    for channel in range(3):
        lines = (channel * height + y) * width
        for left in range(0, width, COLS):
            x = left + tl.arange(0, COLS)[None, :]
            inside = (y < height) & (x < width)
            value = _box(source, lines, x, 1, inside, width - 1, row)
            tl.store(target + lines + x, value.to(tl.int32).to(tl.uint8), mask=inside)


@triton.jit
def rows_kernel(
    pixels, table, sums, spare, made, height, width, chunks,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Flip, jitter, grey, and the blur along the rows: uint8 [N, 3, H, W] in ``made``."""
    view, top = tl.program_id(0).to(tl.int64), tl.program_id(1) * ROWS
    row, plane, start = table + view * COLUMNS, height * width, view * 3 * height * width
    parts = tl.arange(0, CHUNKS)
    summed = tl.where(tl.load(row + LEVEL) >= 0, chunks, 0)
    total = tl.sum(tl.load(sums + view * chunks + parts, mask=parts < summed, other=0).to(tl.int64))
    level = (total.to(tl.float64) / plane).to(tl.float32)
    stop = tl.load(row + STOP).to(tl.int32)
    flip, grey, blurred = tl.load(row + FLIP) > 0, tl.load(row + GREY) > 0, tl.load(row + INNER) >= 0
    target = made + start
    if blurred:
        target = spare + start
    y = top + tl.arange(0, ROWS)[:, None]
    for left in range(0, width, COLS):
        x = left + tl.arange(0, COLS)[None, :]
        inside = (y < height) & (x < width)
        at = y * width + tl.where(flip, width - 1 - x, x)
        r, g, b = _colours(pixels + start, at, inside, plane)
        r, g, b = _jittered(r, g, b, row, stop, level)
        if grey:
            r = _luma(r, g, b).to(tl.float32)
            g, b = r, r
        at = y * width + x
        tl.store(target + at, r.to(tl.int32).to(tl.uint8), mask=inside)
        tl.store(target + plane + at, g.to(tl.int32).to(tl.uint8), mask=inside)
        tl.store(target + 2 * plane + at, b.to(tl.int32).to(tl.uint8), mask=inside)
    if blurred:
        _blur_rows(spare + start, made + start, top, height, width, row, ROWS, COLS)
        _blur_rows(made + start, spare + start, top, height, width, row, ROWS, COLS)
        _blur_rows(spare + start, made + start, top, height, width, row, ROWS, COLS)


@triton.jit
def _blur_columns(source, target, x, height, width, row, ROWS: tl.constexpr):
    for top in range(0, height, ROWS):
        y = top + tl.arange(0, ROWS)[:, None]
        inside = (y < height) & (x < width)
        value = _box(source, x, y, width, inside, height - 1, row)
        tl.store(target + y * width + x, value.to(tl.int32).to(tl.uint8), mask=inside)
    tl.debug_barrier()


@triton.jit
def columns_kernel(made, table, scales, spare, other, out, height, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The blur along the columns, solarise, normalise: float32 [N, 3, H, W] in ``out``."""
    view, channel, left = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * COLS
    row, start = table + view * COLUMNS, (view * 3 + channel) * height * width
    threshold, scale, shift = tl.load(row + SOLARIZE), tl.load(scales + channel), tl.load(scales + 3 + channel)
    x = left + tl.arange(0, COLS)[None, :]
    blurred = tl.load(row + INNER) >= 0
    if blurred:
        _blur_columns(made + start, spare + start, x, height, width, row, ROWS)
        _blur_columns(spare + start, other + start, x, height, width, row, ROWS)
    for top in range(0, height, ROWS):
        y = top + tl.arange(0, ROWS)[:, None]
        inside = (y < height) & (x < width)
        if blurred:
            value = _box(other + start, x, y, width, inside, height - 1, row)
        else:
            value = tl.load(made + start + y * width + x, mask=inside, other=0).to(tl.float32)
        value = tl.where(value >= threshold, 255 - value, value)
        tl.store(out + start + y * width + x, value * scale + shift, mask=inside)
