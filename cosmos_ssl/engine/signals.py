"""SIGTERM and Ctrl-C during a run: finish the step, save, leave."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from cosmos_ssl.errors import EXIT_INTERRUPTED, EXIT_SAVED, CosmosError

_WATCHED = {signal.SIGTERM: ("SIGTERM", EXIT_SAVED), signal.SIGINT: ("Ctrl-C", EXIT_INTERRUPTED)}


class Interrupted(CosmosError):
    """A signal ended the run; ``exit_code`` is the signal's."""

    def __init__(self, number: int, message: str = "") -> None:
        self.number = number
        self.cause, self.exit_code = _WATCHED[signal.Signals(number)]
        super().__init__(message or self.cause)


class Signals:
    """While entered, remembers the first signal; the run asks with ``check``.

    A second Ctrl-C ends the process at once. Off the main thread, where Python allows no handlers, nothing is watched.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _WATCHED}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was set outside Python

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.received is not None:
            raise Interrupted(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            if sys.stderr.isatty():
                os.write(2, b"\x1b[?25h")  # a progress bar hides the cursor
            os._exit(EXIT_INTERRUPTED)
        if self.received is None:
            self.received = number
            again = "; Ctrl-C again leaves at once" if number == signal.SIGINT else ""
            os.write(2, f"\n{_WATCHED[signal.Signals(number)][0]}: saving{again}\n".encode())  # print is not re-entrant
