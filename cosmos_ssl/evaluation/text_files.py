"""Text files that a user names or that lie beside data: read whole, or refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cosmos_ssl.api import DataError


def read_text(path: Any, what: str = "data") -> str:
    """A file (a path, or a resource of a package) of UTF-8, with or without a byte order mark; ``what`` begins the
    message.

    Raises DataError where there is none, for a folder, a pipe or a device (which would be waited for without end), and
    for other bytes.
    """
    try:
        if isinstance(path, Path) and path.exists() and not path.is_file():
            raise DataError(
                f"{what}: {path} is {'a folder' if path.is_dir() else 'no regular file'}, where a text file is due"
            )
        return str(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{what}: {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{what}: {path} cannot be read: it is no text (UTF-8)") from error


def read_json(path: Path, what: str = "data") -> Any:
    """The value that a JSON file holds. Raises DataError."""
    try:
        return json.loads(read_text(path, what))
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what}: {path} is no JSON: {error}") from error
