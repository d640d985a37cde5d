"""What all commands share: how errors end a process, overrides anywhere on the command line, tables and reports."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cosmos_ssl.errors import EXIT_FAILED, EXIT_INTERRUPTED, CosmosError, UserError

DEBUG = "--debug"

_OVERRIDE = re.compile(r"[A-Za-z_][\w-]*(?:\.[\w-]+)*=")


def execute(function: Callable[[], int], *, debug: bool = False) -> int:
    """Run a command. An error of ours becomes its message and its exit code; ``debug`` shows the traceback."""
    try:
        code = function()
        sys.stdout.flush()
        return code
    except CosmosError as error:
        if debug:
            raise
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise
        return EXIT_FAILED


def _stdout_is_closed() -> bool:
    """Whether the reader of our output has gone (``| head``); if so, nothing more is written to it."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse arguments; ``key.sub=value`` may stand anywhere for commands that set ``overrides``, ``--debug`` for all."""
    parser.add_argument(DEBUG, action="store_true", help="show tracebacks of errors")
    words = [text for text in argv if text != DEBUG]
    plain, overrides = _split_overrides(parser, words)
    if not overrides:
        return parser.parse_args(words)
    arguments = parser.parse_args(plain)
    if "overrides" not in arguments:
        return parser.parse_args(words)  # this command takes none: let argparse say so
    arguments.overrides = overrides
    return arguments


def _split_overrides(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    takes_value = _options_with_values(parser)
    plain: list[str] = []
    overrides: list[str] = []
    for text in argv:
        is_value = bool(plain) and plain[-1] in takes_value
        (overrides if _OVERRIDE.match(text) and not is_value else plain).append(text)
    return plain, overrides


def _options_with_values(parser: argparse.ArgumentParser) -> set[str]:
    found: set[str] = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found.update(*(_options_with_values(inner) for inner in action.choices.values()))
        elif action.nargs != 0:
            found.update(action.option_strings)
    return found


def table(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Rows of equal length as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "".join(
        (indent + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))).rstrip() + "\n" for row in rows
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """The flag of all commands that report something."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report there, as JSON")


def write_json(path: Path, value: Any) -> None:
    """Write a report. Raises UserError where the file cannot be written."""
    try:
        path.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written: {error.strerror}") from error
