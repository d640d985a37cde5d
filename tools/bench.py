"""The common parts of the benchmarks: rows with their goals, a table, JSON, and the peak of a process's memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict


class Row(TypedDict):
    """One figure: ``goal`` is what it should reach, ``ok`` whether this run reached it."""

    name: str
    value: float
    unit: str
    goal: str | None
    ok: bool


def row(name: str, value: float, unit: str = "", *, least: float | None = None, most: float | None = None) -> Row:
    """A figure, with a bound if it has one."""
    goal = f">= {least:g}" if least is not None else f"<= {most:g}" if most is not None else None
    ok = (least is None or value >= least) and (most is None or value <= most)
    return {"name": name, "value": float(f"{value:.4g}"), "unit": unit, "goal": goal, "ok": ok}


def report(rows: Sequence[Row], path: Path | None) -> None:
    """Print a table, and write the rows to ``path`` if given."""
    for line in rows:
        ending = "" if line["goal"] is None else f"{line['goal']:<9} {'ok' if line['ok'] else 'SHORT'}"
        print(f"{line['name']:<42} {line['value']:>10.4g} {line['unit']:<18} {ending}".rstrip())
    if path is not None:
        path.write_text(json.dumps(rows, indent=1) + "\n")


def resident_peak() -> int:
    """The most memory that this process ever held, in bytes (of this program: what getrusage tells survives exec)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def print_growth(run: Callable[[], Any]) -> None:
    """Print by how many bytes the peak of memory grows in ``run``: for a process that is asked by ``number_of``."""
    before = resident_peak()
    run()
    print(resident_peak() - before)


def number_of(program: str, *arguments: str) -> int:
    """The number that a program of this folder, run as a process of its own, prints last."""
    command = [sys.executable, str(Path(__file__).with_name(program)), *arguments]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
