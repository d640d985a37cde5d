"""Standard output and error that a run outlives."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


class _Outlet(io.FileIO):
    """A stream that takes everything: what cannot be written any more is dropped."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:  # its reader has gone (``| head``), its terminal or its disk
            return memoryview(data).nbytes


@contextmanager
def steady_streams() -> Iterator[None]:
    """While entered, printing never fails: a reader that has gone does not end a run, whose log.txt has everything."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _steady(sys.stdout, sys.__stdout__), _steady(sys.stderr, sys.__stderr__)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # it was closed from the start (``>&-``)
                stream.flush()
        sys.stdout, sys.stderr = before


def _steady(stream: TextIO | None, own: TextIO | None) -> TextIO:
    """``stream`` itself where it is not the process's own: a notebook's, a test's, a steady one."""
    if stream is None or stream is not own:
        return cast(TextIO, stream)
    with suppress(OSError):
        stream.flush()
    outlet = _Outlet(stream.fileno(), "w", closefd=False)
    by_lines = bool(stream.line_buffering) or stream is sys.__stderr__
    return io.TextIOWrapper(io.BufferedWriter(outlet), stream.encoding, "backslashreplace", line_buffering=by_lines)
