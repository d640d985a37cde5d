"""Ends a process that has stopped making progress, and says where it stood."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from cosmos_ssl.errors import EXIT_LOST, printable


class Watchdog:
    """While entered: after ``minutes`` without a call of ``alive``, stacks of all threads go into a file and the
    process ends.

    The exit code is that of a lost rank, since starting again may help: a read that never returns, a rank that hangs.
    ``describe`` tells more of what was going on. ``minutes`` None watches nothing.

    Where the interpreter itself stands still (native code that never gives back its lock), no thread of Python can do
    this: then a timer outside of it ends the process half as much later, with the stacks alone and exit code 1.
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
            self._file = self.stacks.open("a", encoding="utf-8")
            self.alive()
            threading.Thread(target=self._watch, args=(self.seconds,), name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()

    def alive(self) -> None:
        """Note that the run goes on."""
        self._last = time.monotonic()
        if self._file is not None and self.seconds is not None:
            faulthandler.dump_traceback_later(1.5 * self.seconds, exit=True, file=self._file)

    def _watch(self, seconds: float) -> None:
        while not self._ended.wait(min(1.0, seconds / 4)):
            if time.monotonic() - self._last > seconds:
                self._end(seconds)

    def _end(self, seconds: float) -> None:
        text = printable(f"nothing has happened for {seconds / 60:g} min (training.timeout_minutes): {self.describe()}")
        try:
            with self.stacks.open("a", encoding="utf-8") as file:
                print(f"{text}\nstacks of all threads:", file=file, flush=True)
                faulthandler.dump_traceback(file)
            text += f". Stacks of all threads are in {self.stacks}"
        finally:
            with suppress(OSError):
                print(text, file=sys.stderr, flush=True)
            os._exit(EXIT_LOST)
