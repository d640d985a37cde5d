"""The caption tables that 'data prepare' is given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cosmos_ssl.data.scan import expand
from cosmos_ssl.errors import DataError, UserError


def find_tables(patterns: Sequence[str]) -> list[Path]:
    """The files that these paths and patterns name, in order. Raises UserError where one names none or one twice."""
    found: list[Path] = []
    for pattern in patterns:
        try:
            paths = [Path(pattern)] if Path(pattern).is_dir() else [Path(name) for name in expand([pattern])]
        except DataError as error:
            raise UserError(f"--table {pattern}: no such file") from error
        for path in paths:
            if not path.exists():
                raise UserError(f"--table {path}: no such file")
            if not path.is_file() and not path.is_dir():  # a pipe would be waited for without end
                raise UserError(f"--table {path}: no regular file")
            found += sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not found:
        raise UserError(f"--table {patterns[0]}: this folder holds no parquet file")
    if len(set(found)) < len(found):
        raise UserError(f"--table: {next(p for i, p in enumerate(found) if p in found[:i])} is named twice")
    return found


def stamps(tables: Sequence[Path]) -> list[list[Any]]:
    """Return what tells these files from others, in plain values: path, size and time of each."""
    return [[str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns] for p in tables]
