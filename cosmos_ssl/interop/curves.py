"""A picture of what a run logged: its losses, and what was measured of it, by step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_PANEL, _LEFT, _TOP, _BOTTOM, _NAMES = (640, 260), 56, 30, 34, 190
"""Of a panel: its size in pixels, what its axes leave at the left, at the top and at the bottom, and the room for the
names of curves at the right.
"""
_FONT, _SHARPER = 12, 2
"""Size of letters; lines are drawn so many times larger and made smaller, so that they are smooth."""
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Okabe and Ito's, which colour-blind people tell apart."""

Curves = dict[str, list[tuple[float, float]]]


def draw(rows: Iterable[Mapping[str, Any]], roles: Sequence[str], path: Path) -> bool:
    """Draw the losses of ``rows``, and each evaluator's numbers of these roles, as a PNG; False where no number comes
    twice.
    """
    panels = [(title, curves) for title, curves in _panels(rows, roles).items() if curves]
    if not panels:
        return False
    from PIL import Image

    across = min(2, len(panels))
    width, height = _PANEL
    sheet = Image.new("RGB", (across * width, math.ceil(len(panels) / across) * height), "white")
    for number, (title, curves) in enumerate(panels):
        sheet.paste(_panel(title, curves), (number % across * width, number // across * height))
    sheet.save(path)
    return True


def _panels(rows: Iterable[Mapping[str, Any]], roles: Sequence[str]) -> dict[str, Curves]:
    """Curves of two points and more, at most as many as there are colours, by the panel that they belong to.

    Shares, where an evaluator has some, alone: ranks and the like would flatten them.
    """
    found: dict[str, Curves] = {}
    for row in rows:
        for name, value in row.items():
            first, _, rest = name.partition("/")
            if first != "loss" and rest.partition("/")[0] not in roles:
                continue
            if isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(first, {}).setdefault(name, []).append((row["step"], value))
    panels = {}
    for panel, curves in found.items():
        long = {name: points for name, points in curves.items() if len(points) > 1}
        shares = {name: points for name, points in long.items() if all(0 <= y <= 1 for _, y in points)}
        chosen = shares if shares and panel != "loss" else long
        panels[panel] = dict(list(chosen.items())[: len(_COLOURS)])
    return panels


def _panel(title: str, curves: Curves) -> Any:
    """One pair of axes with its curves, their names, and the least and largest number of each axis."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = (side * _SHARPER for side in _PANEL)
    left, top, bottom = (side * _SHARPER for side in (_LEFT, _TOP, _BOTTOM))
    right, floor = width - _NAMES * _SHARPER, height - bottom
    canvas = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(_FONT * _SHARPER)
    points = [point for curve in curves.values() for point in curve]
    (x0, x1), (y0, y1) = _ends([x for x, _ in points]), _ends([y for _, y in points])

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return (
            left + (point[0] - x0) / (x1 - x0) * (right - left),
            floor - (point[1] - y0) / (y1 - y0) * (floor - top),
        )

    for share in (0.0, 0.5, 1.0):
        y = floor - share * (floor - top)
        pen.line([(left, y), (right, y)], "#dddddd", _SHARPER)
        pen.text((left - 6 * _SHARPER, y), f"{y0 + share * (y1 - y0):.4g}", "#555555", font, anchor="rm")
        x = left + share * (right - left)
        pen.text((x, floor + 6 * _SHARPER), f"{x0 + share * (x1 - x0):,.0f}", "#555555", font, anchor="mt")
    pen.text((left, 6 * _SHARPER), f"{title}, by step", "black", font)
    for number, (name, curve) in enumerate(curves.items()):
        pen.line([place(point) for point in curve], _COLOURS[number], 2 * _SHARPER, joint="curve")
        corner = (right + 8 * _SHARPER, top + number * (_FONT + 4) * _SHARPER)
        pen.text(corner, name.removeprefix(f"{title}/"), _COLOURS[number], font)
    return canvas.resize(_PANEL, Image.Resampling.LANCZOS)


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """The least and the largest, apart from one another."""
    least, largest = min(values), max(values)
    return (least, largest) if largest > least else (least - 0.5, largest + 0.5)
