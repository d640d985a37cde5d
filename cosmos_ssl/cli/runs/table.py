"""Runs as a table in a terminal: what they are at, their metrics, and where their configs differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cosmos_ssl.cli.common import number
from cosmos_ssl.cli.runs.reading import Run
from cosmos_ssl.cli.runs.report import config_differences, remarks, shown
from cosmos_ssl.cli.runs.series import summary
from cosmos_ssl.errors import printable

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

_MOST_KEYS = 12
_COLOURS = {"running": "green", "failed": "red", "interrupted": "yellow", "stopped": "yellow", "queued": "cyan"}


def runs_table(runs: Sequence[Run], metrics: Sequence[str]) -> Group:
    """The table, then the config's differences, then what is to be said of single runs."""
    from rich.console import Group
    from rich.text import Text

    notes = [Text(printable(f"{names}: {text}")) for names, text in remarks(runs)]
    differences = config_differences(runs)
    left_out = max(0, len(differences) - _MOST_KEYS)
    if left_out:
        notes.append(Text(f"{left_out:,} more keys differ; --html, --json and --csv have all"))
    return Group(_numbers(runs, metrics), *([_differences(runs, differences)] if differences else []), *notes)


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _numbers(runs: Sequence[Run], metrics: Sequence[str]) -> Table:
    from rich.text import Text

    table = _table("")
    table.add_column("run", overflow="fold", min_width=6)
    table.add_column("state", no_wrap=True)
    known = any(run.mfu is not None for run in runs)
    for head in ("step", "samples", "hours", "samples/s", *(["MFU"] if known else [])):
        table.add_column(head, justify="right", no_wrap=True)
    for name in metrics:
        table.add_column(Text(printable(name.replace("/", "/\n"))), justify="right", overflow="fold", min_width=7)
    for run in runs:
        cells = [Text(printable(run.name)), Text(run.state, style=_COLOURS.get(run.state, ""))]
        cells += [Text(text) for text in facts_shown(run) if text is not None]
        if known:
            cells.append(Text("-" if run.mfu is None else f"{run.mfu:.1%}"))
        table.add_row(*cells, *(Text(_metric(run, name)) for name in metrics))
    if metrics:
        table.caption = "metrics: the last; below it the best, where that is another, and its step"
        table.caption_justify = "left"
    return table


def facts_shown(run: Run) -> tuple[str, str, str, str]:
    """Step, samples, hours and samples a second, as people read them."""
    of = f" of {run.total:,}" if run.total is not None and run.total != run.step else ""
    return (
        f"{run.step:,}{of}",
        number(run.samples),
        number(run.hours) if run.hours >= 0.01 or not run.hours else f"{run.hours:.2g}",
        "-" if run.rate is None else f"{run.rate:,.0f}" if run.rate >= 100 else f"{run.rate:.3g}",
    )


def value_shown(value: float) -> str:
    """Four digits of a metric."""
    return f"{int(value):,}" if value == int(value) and abs(value) < 1e9 else f"{value:.4g}"


def _metric(run: Run, name: str) -> str:
    if name not in run.series:
        return "-"
    told = summary(run.series[name], name)
    last = value_shown(told["last"])
    if told["best"] == told["last"]:
        return last
    return f"{last}\n{value_shown(told['best'])} at {told['best_step']:,}"


def _differences(runs: Sequence[Run], differences: dict[str, list[object]]) -> Table:
    from rich.text import Text

    table = _table("where the configs differ")
    table.add_column("run", overflow="fold", min_width=6)
    keys = list(differences)[:_MOST_KEYS]
    for key in keys:
        table.add_column(Text(printable(key.replace(".", ".\n"))), overflow="fold", min_width=5)
    for place, run in enumerate(runs):
        table.add_row(Text(printable(run.name)), *(Text(shown(differences[key][place])) for key in keys))
    return table
