"""Signals during a run: finish the step, save, leave; before there is anything to save, leave at once."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from cosmos_ssl.errors import EXIT_INTERRUPTED, EXIT_SAVED, CosmosError

log = logging.getLogger(__name__)

_WATCHED = {
    signal.SIGTERM: ("SIGTERM", EXIT_SAVED),
    signal.SIGUSR2: ("SIGUSR2", EXIT_SAVED),
    signal.SIGINT: ("Ctrl-C", EXIT_INTERRUPTED),
}

CAUSES = tuple(cause for cause, _ in _WATCHED.values())
"""What the message of ``Interrupted`` begins by."""

AHEAD = "the step under way ends first, then all is saved"
"""What a signal has to wait for."""


class Interrupted(CosmosError):
    """A signal ended the run; ``exit_code`` is the signal's. ``together``: all ranks leave at the same step."""

    def __init__(self, number: int, message: str = "", *, together: bool = False) -> None:
        self.number, self.together = number, together
        self.cause, self.exit_code = _WATCHED[signal.Signals(number)]
        super().__init__(message or self.cause)


class Signals:
    """While entered, remembers the first signal.

    A thread learns of signals from the kernel by way of a pipe, because a Python handler has to wait until a
    collective, or whatever else the main thread is in, returns. While ``at_once`` is set a signal ends the process
    there and then, as a second Ctrl-C always does. Off the main thread, where Python allows no handlers, nothing is
    watched.
    """

    def __init__(self, *, at_once: bool = False, leaving: Callable[[int], int] | None = None) -> None:
        """``leaving`` is called with a signal that ends the process at once, and gives the exit code."""
        self.at_once = at_once
        self._leaving = leaving
        self.ahead = AHEAD
        """What has to end before this process can leave, for the line that is printed when a signal comes."""
        self.received: int | None = None
        """The signal that has come to this process."""
        self._before: dict[signal.Signals, Any] = {}
        self._pipe = (-1, -1)
        self._old_descriptor = -1

    def __enter__(self) -> Signals:
        _entered.append(self)
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._old_descriptor = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, _noted) for number in _WATCHED}
            threading.Thread(target=self._read, args=(self._pipe[0],), name="signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _entered.remove(self)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was set outside Python
        if self._pipe[1] >= 0:
            signal.set_wakeup_fd(self._old_descriptor)
            os.close(self._pipe[1])  # ends the thread
            self._pipe = (-1, -1)

    def _read(self, descriptor: int) -> None:
        while numbers := os.read(descriptor, 64):
            for number in numbers:
                if number in _WATCHED:
                    self._take(number)
        os.close(descriptor)

    def _take(self, number: int) -> None:
        cause, code = _WATCHED[signal.Signals(number)]
        if self.at_once or (self.received is not None and number == signal.SIGINT):
            if sys.stderr is not None and sys.stderr.isatty():
                _say("\x1b[?25h")  # a progress bar hides the cursor
            if self.at_once:
                _say(f"\n{cause}: nothing to save yet\n")
            os._exit(code if self._leaving is None else self._leaving(number))
        if self.received is None:
            self.received = number
            again = "; Ctrl-C again leaves at once" if number == signal.SIGINT else ""
            text = f"{cause}: {self.ahead}{again}"
            _say(f"\n{text}\n")
            # in a thread, since the log may wait: for storage that is lost, or for what the main thread is in the midst
            # of
            threading.Thread(target=log.info, args=(text,), kwargs={"extra": {"file_only": True}}, daemon=True).start()


_entered: list[Signals] = []


def has_come(ahead: str) -> bool:
    """Return whether a signal has come to this process; ``ahead`` is what is said where one comes from now on."""
    for signals in _entered:
        signals.ahead = ahead
    return any(signals.received is not None for signals in _entered)


def _say(text: str) -> None:
    """Past the stream, which the main thread may be holding; nobody may be left to read it."""
    with suppress(OSError):
        os.write(2, text.encode())


def _noted(number: int, frame: FrameType | None) -> None:
    """The thread does it."""
