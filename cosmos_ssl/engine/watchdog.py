"""Ends a process that has stopped making progress, and says where it stood."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from cosmos_ssl.errors import EXIT_LOST, STOOD_STILL, printable
from cosmos_ssl.liveness import on_alive, place

_PATIENCE = 10.0
"""Seconds that a file in the run folder may take to open, or to be written: its storage may be what hangs."""


class Watchdog:
    """While entered: after ``minutes`` without a call of ``alive``, stacks of all threads go into a file and the
    process ends.

    The exit code is that of a lost rank, since starting again may help: a read that never returns, a rank that hangs.
    ``describe`` tells more of what was going on. ``minutes`` None watches nothing.

    Where the interpreter itself stands still (native code that never gives back its lock), no thread of Python can do
    this: then a timer outside of it ends the process half as much later, with the stacks alone and exit code 1.

    Where the file cannot be opened, or its storage hangs too, the stacks go to the terminal.
    """

    def __init__(self, minutes: float | None, stacks: Path, describe: Callable[[], str]) -> None:
        self.seconds = None if minutes is None else 60 * minutes
        self.stacks = stacks
        self.describe = describe
        self._last = time.monotonic()
        self._ended = threading.Event()
        self._file: IO[str] | None = None

    def __enter__(self) -> Watchdog:
        if self.seconds is not None:
            _within(_PATIENCE, self._open)
            self.alive()
            threading.Thread(target=self._watch, args=(self.seconds,), name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self.seconds is not None:
            faulthandler.cancel_dump_traceback_later()
        if self._file is not None:
            self._file.close()

    def alive(self) -> None:
        """Note that the run goes on."""
        self._last = time.monotonic()
        if self.seconds is not None:
            with suppress(OSError, ValueError, AttributeError):  # a stand-in for a terminal, which is no file
                file = self._file or sys.__stderr__
                faulthandler.dump_traceback_later(1.5 * self.seconds, exit=True, file=file)  # type: ignore[arg-type]

    def _open(self) -> None:
        with suppress(OSError):
            self._file = self.stacks.open("a", encoding="utf-8")

    def _watch(self, seconds: float) -> None:
        while not self._ended.wait(min(1.0, seconds / 4)):
            if time.monotonic() - self._last > seconds:
                self._end(seconds)

    def _end(self, seconds: float) -> None:
        text = printable(f"{STOOD_STILL} for {seconds / 60:g} min (training.timeout_minutes): {self.describe()}")

        def keep() -> None:
            with self.stacks.open("a", encoding="utf-8") as file:
                print(f"{text}\nstacks of all threads:", file=file, flush=True)
                faulthandler.dump_traceback(file)

        try:
            if _within(_PATIENCE, keep):
                text += f". Stacks of all threads are in {self.stacks}"
            else:
                with suppress(OSError, ValueError):
                    faulthandler.dump_traceback(sys.__stderr__)  # type: ignore[arg-type]
        finally:
            with suppress(OSError):
                print(text, file=sys.stderr, flush=True)
            os._exit(EXIT_LOST)


def _within(seconds: float, work: Callable[[], None]) -> bool:
    """Do ``work`` in a thread, which is left to itself after so many seconds; whether it was done."""
    done = threading.Event()

    def run() -> None:
        with suppress(OSError):
            work()
            done.set()

    thread = threading.Thread(target=run, name="watchdog's file", daemon=True)
    thread.start()
    thread.join(seconds)
    return done.is_set()


@contextmanager
def watched_start(minutes: float | None, stacks: Path, rank: int) -> Iterator[None]:
    """End this process where for ``minutes`` nothing is heard of the work before training starts (``liveness``)."""
    watchdog = Watchdog(minutes, stacks, lambda: f"rank {rank}, {place()}")
    with watchdog, on_alive(watchdog.alive):
        yield
