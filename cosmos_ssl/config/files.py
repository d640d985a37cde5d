"""The JSON files of a run's folder, which a crash, a full disk or a hand may have damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cosmos_ssl.errors import UserError


def read_object(path: Path, keys: Mapping[str, type], advice: str) -> dict[str, Any]:
    """The object in a file, which has ``keys`` of these types.

    Raises UserError, which ends with ``advice``, where the file is damaged; OSError where storage fails.
    """
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}). {advice}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no table. {advice}")
    for key, kind in keys.items():
        if type(found.get(key)) is not kind:
            raise UserError(f"{path} is damaged: it holds no '{key}'. {advice}")
    return found


def set_aside(path: Path) -> Path:
    """Rename a damaged file or folder to ``NAME.damaged``, in place of an older one of that name."""
    aside = path.with_name(f"{path.name}.damaged")
    if aside.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    return aside
