"""The base of all commands: how errors end a process, overrides anywhere on the command line, tables and reports."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TextIO

from cosmos_ssl.errors import EXIT_FAILED, EXIT_INTERRUPTED, CheckpointError, CosmosError, printable
from cosmos_ssl.files import run_path, storage_error, storage_faults, written_whole
from cosmos_ssl.streams import steady_streams

DEBUG = "--debug"

_OVERRIDE = re.compile(r"[A-Za-z_][\w-]*(?:\.[\w-]+)*=")


def execute(function: Callable[[], int], *, debug: bool = False) -> int:
    """Run a command. An error of ours becomes its message and its exit code; ``debug`` shows the traceback."""
    try:
        code = function()
        print(end="", flush=True)
        return code
    except CosmosError as error:
        if debug:
            raise
        return _say(error, error.exit_code)
    except KeyboardInterrupt:
        return _say("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise
        return EXIT_FAILED
    except OSError as error:
        if debug:
            raise
        told = storage_error(error, "storage fails")
        return _say(told, told.exit_code)


def _say(what: object, code: int) -> int:
    """Print why it ends; the exit code, which stands whether or not anyone is left to read that."""
    with steady_streams():
        print(printable(str(what)), file=sys.stderr)
    return code


def _stdout_is_closed() -> bool:
    """Return whether the reader of our output has gone (``| head``); if so, nothing more is written to it."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse arguments; ``key.sub=value`` may stand anywhere for commands that set ``overrides``, and ``--debug``."""
    parser.add_argument(DEBUG, action="store_true", help="show tracebacks of errors")
    words = [text for text in argv if text != DEBUG]
    chain = _called(parser, words)
    if chain[-1].get_default("overrides") is None:
        return parser.parse_args(words)
    takes_value = {
        name for inner in chain for action in inner._actions if action.nargs != 0 for name in action.option_strings
    }
    plain: list[str] = []
    overrides: list[str] = []
    for text in words:
        is_value = bool(plain) and plain[-1] in takes_value
        (overrides if _OVERRIDE.match(text) and not is_value else plain).append(text)
    arguments = parser.parse_args(plain)
    arguments.overrides = overrides
    return arguments


def _called(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[argparse.ArgumentParser]:
    """The parser and those of the command and action that ``argv`` names."""
    chain = [parser]
    for text in argv:
        for action in chain[-1]._actions:
            if isinstance(action, argparse._SubParsersAction) and text in action.choices:
                chain.append(action.choices[text])
                break
    return chain


def table(rows: Sequence[Sequence[str]], indent: str = "", align: str = "<") -> str:
    """Rows of equal length as columns; ``align``: of all but the first, ``>`` for numbers."""
    rows = [[printable(cell) for cell in row] for row in rows]
    columns = list(zip(*rows, strict=True))
    formats = [f"{align if number else '<'}{max(map(len, column))}" for number, column in enumerate(columns)]
    lines = ("  ".join(map(format, row, formats)) for row in rows)
    return "".join(f"{indent}{line}".rstrip() + "\n" for line in lines)


def number(value: float | None) -> str:
    """Four digits that mean something, all of a whole number; ``-`` for a ratio to nothing."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    places = 3 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:,.{max(0, places)}f}" if places < 9 else "0"


def number_table(title: str, heads: Sequence[str], rows: Mapping[str, Sequence[float | None]]) -> None:
    """Print rows of numbers under their heads."""
    cells = [[text, *map(number, values)] for text, values in rows.items()]
    print("\n" + table([[title, *heads], *cells], align=">"), end="")


def run_argument(text: str) -> Path:
    """Convert the text of an argument that names a run directory. For ``add_argument(type=...)``."""
    try:
        return run_path(text)
    except CheckpointError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the flag of all commands that report something."""
    words = "also write the report there, as JSON; - is standard output, and all else then goes to standard error"
    parser.add_argument("--json", type=Path, metavar="FILE", help=words)


STDOUT = Path("-")
"""The file name that stands for standard output in options that write a report."""
_report_stream: ContextVar[TextIO | None] = ContextVar("report_stream", default=None)


def reports_to_stdout(arguments: argparse.Namespace) -> bool:
    """Return whether a command writes a report to standard output."""
    return any(getattr(arguments, option, None) == STDOUT for option in ("json", "csv", "html"))


@contextmanager
def stdout_for_reports(arguments: argparse.Namespace) -> Iterator[None]:
    """If a report goes to standard output, send everything else that is printed there to standard error."""
    if not reports_to_stdout(arguments):
        yield
        return
    token = _report_stream.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _report_stream.reset(token)


def write_json(path: Path, value: Any) -> None:
    """Write a report to a file, a device or a pipe, or to standard output if ``path`` is ``-``.

    A file is written whole or not at all.

    Raises:
        UserError: If nothing can be written there.
        StorageError: If the storage fails.
    """
    write_report("--json", path, json.dumps(value, indent=2, default=str) + "\n")


def write_report(option: str, path: Path, text: str) -> None:
    """Write what ``option`` asks for, as ``write_json`` does."""
    if path == STDOUT:
        print(text, end="", file=_report_stream.get() or sys.stdout, flush=True)
        return
    with storage_faults(f"{option} {path}: cannot be written"):
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        with written_whole(path) as file:
            file.write(text.encode("utf-8", "replace"))
