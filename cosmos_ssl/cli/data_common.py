"""What the commands on data share: how storage that fails is told, and how far long work has come."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cosmos_ssl.errors import CosmosError, StorageError

URLS = "shards: paths or fsspec URLs with braces or *, lists joined by ::, list files (.list)"
_LINE_SECONDS = 30.0


@contextmanager
def storage() -> Iterator[None]:
    """Storage that fails is told in one line."""
    try:
        yield
    except OSError as error:
        if isinstance(error, CosmosError):
            raise
        raise StorageError(f"data: storage fails: {error}") from error


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """``stages`` for work of one kind."""
    with stages() as told:
        yield lambda done, total: told(what, done, total)


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """A function of (what, done, total): a bar on a terminal; elsewhere a line at every tenth and every half minute.

    Both tell the rate and the time that is left. A total of 0 is not known.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
            tasks: dict[str, tuple[TaskID, _Rate]] = {}

            def move(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = (bar.add_task(what, total=None, rate=""), _Rate(done))
                task, rate = tasks[what]
                bar.update(task, completed=done, total=total or None, rate=f"{rate(done):,.0f}/s")

            yield move
        return
    lines = _Lines()
    yield lines.told


class _Rate:
    """Units a second since the first call; what was done before it (continued work) does not count."""

    def __init__(self, done: int) -> None:
        self._start, self._done = time.monotonic(), done

    def __call__(self, done: int) -> float:
        return (done - self._done) / max(time.monotonic() - self._start, 1e-6)


class _Lines:
    def __init__(self) -> None:
        self._what = ""
        self._tenth = 0
        self._last = 0.0
        self._rate = _Rate(0)

    def told(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._tenth, self._last, self._rate = what, 0, now, _Rate(done)
        tenth = done * 10 // total if total else 0
        if (tenth > self._tenth and total >= 20) or now - self._last > _LINE_SECONDS:
            self._tenth, self._last = tenth, now
            rate = self._rate(done)
            left = f", {_minutes((total - done) / rate)} left" if total > done and rate > 0 else ""
            print(f"{done:,}{f' of {total:,}' if total else ''} {what} ({rate:,.0f}/s{left})", file=sys.stderr, flush=True)


def _minutes(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def add_workers(parser: argparse.ArgumentParser) -> None:
    """The flag of commands that work in several processes."""
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
