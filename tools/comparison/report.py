"""Figures of all runs: over seeds, as rows for a file and as tables for people."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TypedDict

from comparison.plan import FIGURES, RANKS, ROLES, Method, Run


class Row(TypedDict):
    """One figure over the seeds: mean, extremes, standard deviation."""

    name: str
    value: float
    unit: str
    least: float
    most: float
    deviation: float
    seeds: int


def gathered(runs: Sequence[Run], compared: Sequence[Method]) -> list[Row]:
    """Return every figure of every method and role over the seeds, and the cost of each method."""
    rows = []
    for method in compared:
        own = [run.figures for run in runs if run.method == method]
        require_measured(method, own)
        units = {name: "" if name.partition("/")[2] in RANKS else "%" for name in own[0] if name != "speed"}
        rows += [row(f"{method.key}/{name}", [each[name] for each in own], unit) for name, unit in units.items()]
        rows.append(row(f"{method.key}/samples", [method.samples], "samples"))
        rows.append(row(f"{method.key}/flops", [method.flops / 1e9], "GFLOP a sample"))
        rows.append(row(f"{method.key}/minutes", [method.samples / each["speed"] / 60 for each in own], "min"))
    return rows


def require_measured(method: Method, runs: Sequence[Mapping[str, float]]) -> None:
    """Raise SystemExit unless all runs trained and retrieved; the best possible mean rank is 1."""
    values = [("runs", len(runs), 1.0), ("samples", method.samples, 1.0), ("flops", method.flops, 1.0)]
    for figures in runs:
        values.append(("speed", figures.get("speed", 0.0), 1e-3))
        names = [f"{role}/{name}" for role in ROLES for name in RANKS]
        values += [(name, figures.get(name, 0.0), 1.0) for name in names]
    if missing := sorted({name for name, value, least in values if not value >= least}):
        raise SystemExit(f"{method.key} measured nothing: {', '.join(missing)}. Delete its runs and repeat")


def row(name: str, values: Sequence[float], unit: str) -> Row:
    """Mean, extremes and standard deviation (of a sample) of one figure."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    mean, least, most, deviation = (
        float(f"{x:.6g}") for x in (statistics.fmean(values), min(values), max(values), deviation)
    )
    return Row(name=name, value=mean, unit=unit, least=least, most=most, deviation=deviation, seeds=len(values))


def markdown(rows: Sequence[Row], compared: Sequence[Method], role: str) -> str:
    """A table of one role: a line a figure, a column a method, cells ``mean (least to most)``."""
    found = {each["name"]: each for each in rows}

    def line(text: str, name: str, digits: int = 1) -> list[str]:
        cells = []
        for each in (found.get(f"{method.key}/{name}") for method in compared):
            mean, *ends = (
                ("", "", "") if each is None else (f"{each[key]:,.{digits}f}" for key in ("value", "least", "most"))
            )
            cells.append((mean if ends[0] == ends[1] else f"{mean} ({' to '.join(ends)})") or "-")
        return [text, *cells]

    figures = {
        name: text
        for name, text in (FIGURES | RANKS).items()
        if any(f"{m.key}/{role}/{name}" in found for m in compared)
    }
    lines = [[f"{role}, %", *(method.label for method in compared)], ["---"] * (1 + len(compared))]
    lines += [line(text, f"{role}/{name}") for name, text in figures.items()]
    lines += [
        line("samples", "samples", 0),
        line("GFLOP a sample", "flops", 2),
        line("minutes of training on one core", "minutes"),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
