"""How long work shows that it goes on: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_FEW = 20  # less work than this needs no lines
_LINE_SECONDS = 30.0
_RATE_SECONDS = 1.0  # a rate over less time than this means nothing


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """``stages`` for work of one kind."""
    with stages() as told:
        yield lambda done, total: told(what, done, total)


@contextmanager
def stages(*, shown: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """A function of (what, done, total): a bar on a terminal; elsewhere a line at every tenth and every half minute.

    Both show the rate and the time that is left, after the first second. A total of 0 is not known. Work that starts
    anew begins again. Without ``shown`` nothing is (ranks but the first).
    """
    if not shown:
        yield lambda what, done, total: None
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
            tasks: dict[str, tuple[TaskID, _Rate]] = {}

            def move(what: str, done: int, total: int) -> None:
                if what not in tasks or done < tasks[what][1].latest:
                    tasks[what] = (bar.add_task(what, total=None, rate=""), _Rate(done))
                task, rate = tasks[what]
                speed = rate(done)
                bar.update(task, completed=done, total=total or None, rate="" if speed is None else f"{speed:,.0f}/s")

            yield move
        return
    lines = _Lines()
    yield lines.told


class _Rate:
    """Units per second since the first call, None in the first second.

    What was done before it (continued work) does not count.
    """

    def __init__(self, done: int) -> None:
        self._start, self._done, self.latest = time.monotonic(), done, done

    def __call__(self, done: int) -> float | None:
        self.latest = done
        seconds = time.monotonic() - self._start
        return None if seconds < _RATE_SECONDS else (done - self._done) / seconds


class _Lines:
    def __init__(self) -> None:
        self._what, self._tenth, self._last, self._rate = "", 0, 0.0, _Rate(0)

    def told(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what or done < self._rate.latest:  # other work, or the same once more
            self._what, self._tenth, self._last, self._rate = what, 0, now, _Rate(done)
        tenth, rate = done * 10 // total if total else 0, self._rate(done)
        if (tenth > self._tenth and total >= _FEW) or now - self._last > _LINE_SECONDS:
            self._tenth, self._last = tenth, now
            left = f", {_minutes((total - done) / rate)} left" if total > done and rate else ""
            speed = "" if rate is None else f" ({rate:,.0f}/s{left})"
            print(f"{done:,}{f' of {total:,}' if total else ''} {what}{speed}", file=sys.stderr, flush=True)


def _minutes(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
