"""Common parts of the benchmarks: rows with bounds, a table, JSON, and the peak memory of a process.

A benchmark must not pass if it measured nothing. Every value must therefore exceed a lower bound, which is 0 by
default. Pass ``more_than=None`` only if zero is a legitimate result. Ratios and differences keep both measured sides,
and fail if one of them is empty.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

MIN_SECONDS = 1e-4
"""Every measured call takes longer. A call that does no work takes a few microseconds."""
SCALES = {"s": 1, "ms": 1e3}


class Row(TypedDict):
    """One result: ``goal`` states its bounds, ``ok`` whether it is within them, ``sides`` what it was computed from."""

    name: str
    value: float
    unit: str
    sides: list[float]
    goal: str | None
    ok: bool


def make_row(
    name: str,
    value: float,
    unit: str = "",
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    more_than: float | None = 0.0,
    sides: Sequence[float] = (),
) -> Row:
    """Return a row that is ok if its value is finite and within all bounds."""
    bounds = [
        (">", None if at_least is not None else more_than, more_than is None or value > more_than),
        (">=", at_least, at_least is None or value >= at_least),
        ("<=", at_most, at_most is None or value <= at_most),
    ]
    return {
        "name": name,
        "value": float(f"{value:.4g}"),
        "unit": unit,
        "sides": [float(f"{side:.4g}") for side in sides],
        "goal": ", ".join(f"{sign} {bound:g}" for sign, bound, _ in bounds if bound is not None) or None,
        "ok": math.isfinite(value) and all(reached for *_, reached in bounds),
    }


def make_ratio_row(
    name: str,
    numerator: float | Sequence[float],
    denominator: float | Sequence[float],
    unit: str = "x",
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    sides_more_than: float = 0.0,
) -> Row:
    """Return the row of a ratio, the median of paired ones for two sequences.

    The ratio is 0, which fails, unless the medians of both sides exceed ``sides_more_than``.
    """
    pairs = [[side] if isinstance(side, int | float) else list(side) for side in (numerator, denominator)]
    sides = [statistics.median(values) for values in pairs]
    measured = all(side > sides_more_than for side in sides) and 0 not in pairs[1]
    value = statistics.median(a / b for a, b in zip(*pairs, strict=True)) if measured else 0.0
    return make_row(name, value, unit, at_least=at_least, at_most=at_most, sides=sides)


def make_duration_row(
    name: str, seconds: float, unit: str = "s", *, at_most: float | None = None, more_than: float = MIN_SECONDS
) -> Row:
    """Return the row of a duration in ``s`` or ``ms`` (``at_most`` too); ``more_than`` is in seconds."""
    scale = SCALES[unit.split()[0]]
    return make_row(name, scale * seconds, unit, at_most=at_most, more_than=scale * more_than)


def make_difference_row(
    name: str, expected: Mapping[str, float], measured: Mapping[str, float], *, at_most: float
) -> Row:
    """Return the row of the largest difference between two sets of named numbers.

    The difference is infinite if the names differ, or if a side is empty or has only zeros.
    """
    sides = [max((abs(value) for value in side.values()), default=0.0) for side in (expected, measured)]
    differences = [math.inf]
    if expected.keys() == measured.keys() and all(sides):
        differences = [abs(expected[key] - measured[key]) for key in expected]
    value = max(differences) if all(map(math.isfinite, differences)) else math.inf
    return make_row(name, value, at_most=at_most, more_than=None, sides=sides)


def report(rows: Sequence[Row], path: Path | None) -> int:
    """Print a table and write the rows to ``path`` if given.

    Returns:
        The exit code: 0 if there are rows and all are ok, else 1.
    """
    for row in rows:
        result = "ok" if row["ok"] else "FAIL" + f" (sides {row['sides']})" * bool(row["sides"])
        goal = row["goal"] or ""
        print(f"{row['name']:<42} {row['value']:>10.4g} {row['unit']:<18} {goal:<16} {result}")
    if path is not None:
        finite = [{**row, "value": row["value"] if math.isfinite(row["value"]) else None} for row in rows]
        path.write_text(json.dumps(finite, indent=1) + "\n")
    failed = sum(not row["ok"] for row in rows)
    if failed or not rows:
        print(f"{failed} of {len(rows)} rows failed", file=sys.stderr)
    return int(failed > 0 or not rows)


def get_peak_memory() -> int:
    """Return the peak resident memory of this process in bytes (that of getrusage survives exec)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def print_memory_growth(run: Callable[[], Any]) -> None:
    """Print by how many bytes the peak memory grows in ``run``, in a process started by ``get_printed_number``."""
    before = get_peak_memory()
    run()
    print(get_peak_memory() - before)


def get_printed_number(program: str, *arguments: str) -> int:
    """Run a program of this folder in its own process and return the number that it prints last."""
    command = [sys.executable, str(Path(__file__).with_name(program)), *arguments]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
