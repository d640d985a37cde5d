"""``cosmos-ssl runs``: runs side by side, from their folders alone, also while they go on.

``finding`` and ``reading`` go from paths to what each folder says, ``report`` to the metrics and differences that are
told, ``table`` to the terminal, ``page`` (with ``gallery`` and ``static``) to a page of HTML.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_ssl.cli.common import STDOUT, add_json, reports_to_stdout, run_argument, write_json, write_report
from cosmos_ssl.errors import EXIT_DONE, UserError, listed, printable
from cosmos_ssl.files import storage_faults

if TYPE_CHECKING:
    from cosmos_ssl.cli.runs.gallery import Gallery
    from cosmos_ssl.cli.runs.reading import Reader, Run

_PERIOD = 10.0
_WIDE = 10_000  # characters: what reads a pipe has no width


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "runs",
        description="Sets runs side by side: state, step, samples, hours of training, samples a second, MFU where it "
        "is known, the last and the best of metrics, and the keys in which their resolved configs differ. Folders are "
        "read alone, also while runs go on.",
        epilog="Less of a loss, a rank, an error or a wait is better, more of all else. States: running, queued, "
        "finished, stopped (by a callback), interrupted (by a signal or without a word; the same command goes on), "
        "failed.",
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=run_argument, help="run folders, or folders that hold some"
    )
    facts = "a metric (by its best), or name, state, step, samples, hours, samples_per_second or mfu"
    parser.add_argument("--sort", metavar="KEY", help=f"the best first: {facts}")
    parser.add_argument("--reverse", action="store_true", help="the worst first")
    patterns = "metrics to show, as 'retrieval/*R@1,loss' (default: a few; --json and --csv: all)"
    parser.add_argument("--metrics", action="append", metavar="PATTERN", help=patterns)
    html = "write a page: curves, config differences, pictures and warnings; one file that needs nothing else"
    parser.add_argument("--html", type=Path, metavar="FILE", help=html)
    add_json(parser)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a line a run; - is standard output")
    flops = "count what a sample costs by each run's config (takes seconds), for curves over FLOPs"
    parser.add_argument("--flops", action="store_true", help=flops)
    watch = f"renew all that while runs go on, every so many seconds (default: {_PERIOD:g})"
    parser.add_argument("--watch", type=_seconds, nargs="?", const=_PERIOD, metavar="SECONDS", help=watch)
    parser.set_defaults(run=_runs)


def _seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0.1 <= found <= 86_400:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds from 0.1 to 86,400. Runs come before --watch")
    return found


def _runs(arguments: argparse.Namespace) -> int:
    from cosmos_ssl.cli.runs.finding import find_runs
    from cosmos_ssl.cli.runs.gallery import Gallery
    from cosmos_ssl.cli.runs.reading import Reader

    _check(arguments)
    _, others = find_runs(arguments.runs)
    if others:
        told = "is no run folder and is left out" if len(others) == 1 else "are no run folders and are left out"
        print(printable(f"{listed(others)} {told}"), file=sys.stderr)
    reader, gallery, flops = Reader(), Gallery(), dict[str, float | None]()
    if arguments.watch is None:
        runs, metrics = _read(arguments, reader, flops)
        _write(arguments, runs, metrics, gallery, refresh=None)
        if not reports_to_stdout(arguments):
            _console().print(_shown(arguments, runs, metrics))
        return EXIT_DONE
    return _watch(arguments, reader, gallery, flops)


def _check(arguments: argparse.Namespace) -> None:
    if reports_to_stdout(arguments) and arguments.watch is not None:
        raise UserError("--watch renews files and the table: give --json and --csv a file")
    if [arguments.json, arguments.csv, arguments.html].count(STDOUT) > 1:
        raise UserError("--json, --csv and --html cannot both go to standard output")
    for option in ("html", "json", "csv"):
        path: Path | None = getattr(arguments, option)
        if path is not None and path != STDOUT and not path.absolute().parent.is_dir():
            raise UserError(f"--{option} {path}: the folder {path.absolute().parent} is not there")


def _read(
    arguments: argparse.Namespace, reader: Reader, flops: dict[str, float | None]
) -> tuple[list[Run], list[str] | None]:
    """The runs in their order, and the metrics that were asked for."""
    from cosmos_ssl.cli.runs.finding import find_runs, short_names
    from cosmos_ssl.cli.runs.report import chosen_metrics, sorted_runs

    folders, _ = find_runs(arguments.runs)
    with storage_faults("a run folder cannot be read"):
        runs = [reader.read(path, name) for path, name in zip(folders, short_names(folders), strict=True)]
    if arguments.flops:
        from cosmos_ssl.cli.runs.counting import flops_per_sample

        runs = [replace(run, flops=flops_per_sample(run, flops)) for run in runs]
    runs = sorted_runs(runs, arguments.sort, worst_first=arguments.reverse)
    patterns = [pattern for text in arguments.metrics or () for pattern in text.split(",") if pattern]
    return runs, chosen_metrics(runs, patterns) if patterns else None


def _write(
    arguments: argparse.Namespace,
    runs: Sequence[Run],
    metrics: list[str] | None,
    gallery: Gallery,
    refresh: float | None,
) -> None:
    from cosmos_ssl.cli.runs.report import as_csv, as_json, metric_names, shown_metrics

    if arguments.html:
        from cosmos_ssl.cli.runs.page import runs_page

        shown = shown_metrics(runs, arguments.sort) if metrics is None else metrics
        write_report("--html", arguments.html, runs_page(runs, shown, gallery, sort=arguments.sort, refresh=refresh))
    every = metric_names(runs) if metrics is None else metrics
    if arguments.json:
        write_json(arguments.json, as_json(runs, every))
    if arguments.csv:
        write_report("--csv", arguments.csv, as_csv(runs, every))


def _console() -> Any:
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=_WIDE)


def _shown(arguments: argparse.Namespace, runs: Sequence[Run], metrics: list[str] | None) -> Any:
    from cosmos_ssl.cli.runs.report import shown_metrics
    from cosmos_ssl.cli.runs.table import runs_table

    return runs_table(runs, shown_metrics(runs, arguments.sort) if metrics is None else metrics)


def _watch(arguments: argparse.Namespace, reader: Reader, gallery: Gallery, flops: dict[str, float | None]) -> int:
    """Renew table and files until no run goes on any more."""
    from rich.live import Live

    from cosmos_ssl.cli.runs.reading import LIVE

    console = _console()
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        while True:
            runs, metrics = _read(arguments, reader, flops)
            going = any(run.state in LIVE for run in runs)
            _write(arguments, runs, metrics, gallery, refresh=arguments.watch if going else None)
            table = _shown(arguments, runs, metrics)
            if console.is_terminal:
                live.update(table, refresh=True)
            else:
                console.print(table)
            if not going:
                return EXIT_DONE
            time.sleep(arguments.watch)
