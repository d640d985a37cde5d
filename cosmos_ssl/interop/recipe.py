"""A run's config as readers elsewhere may see it: without this machine's folders, and without what opens storage."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit, urlunsplit

_SECRET = re.compile(r"token|secret|password|api_?key|credential", re.IGNORECASE)
_HIDDEN = "..."


def without_places(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the last part alone of absolute paths, addresses without users and queries, and the commands of
    ``pipe:`` and the values of secrets left out. ``output_dir`` goes whole.
    """
    return {key: _told(key, value) for key, value in config.items() if key != "output_dir"}


def _told(key: object, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {inner: _told(inner, each) for inner, each in value.items()}
    if isinstance(value, list | tuple):
        return [_told(key, each) for each in value]
    if not isinstance(value, str):
        return value
    if _SECRET.search(str(key)):
        return _HIDDEN
    if value.startswith("pipe:"):
        return f"pipe:{_HIDDEN}"
    if "://" in value:
        parts = urlsplit(value)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    if value.startswith(("/", "~", "local-dir:/", "local-dir:~")):
        return f"{_HIDDEN}/{value.rstrip('/').rpartition('/')[2]}"
    return value
