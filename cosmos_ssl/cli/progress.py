"""How long work shows that it goes on: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_FEW = 20  # less work than this needs no lines


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (done, total): it moves a bar, or writes ``410 of 4,096 WHAT`` to standard error at every tenth."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    tenth = -1

    def line(done: int, total: int) -> None:
        nonlocal tenth
        before, tenth = tenth, done * 10 // max(1, total)
        if total >= _FEW and tenth > max(0, before):
            print(f"{done:,} of {total:,} {what}", file=sys.stderr, flush=True)

    yield line
