"""The errors of the project and the exit code that each one means.

Users' mistakes are ``UserError``: one clear message, no traceback. ``assert`` is for programmers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER = 2
EXIT_FAULTS = 3
EXIT_LOST = 74
EXIT_SAVED = 75
EXIT_INTERRUPTED = 130


STOOD_STILL = "nothing has happened"
"""So begins what a process says that ends because it has stopped making progress."""


class CosmosError(Exception):
    """Base of every error that is shown as its message alone; ``exit_code`` is what the process returns."""

    exit_code = EXIT_FAILED


class UserError(CosmosError, ValueError):
    """What the user gave cannot be used: a config, a path, a data set, a checkpoint."""

    exit_code = EXIT_USER


class ConfigError(UserError):
    """One or more faults of a config, each already located; all faults of a stage come together."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(self.faults))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[Sequence[str]]]:
        return type(self), (self.faults,)


class PluginError(UserError):
    """A part cannot be found, imported, built, or broke its contract; the message names its distribution."""


class DataError(UserError):
    """Shards, captions or images that cannot be used at all."""


class CheckpointError(UserError):
    """A checkpoint that is damaged, of another size or of another role."""


class TrainingError(CosmosError):
    """Training cannot go on and would fail again: losses stay non-finite, the error budget is spent."""


class StorageError(CosmosError):
    """Storage, a rank or a node was lost; starting again may succeed."""

    exit_code = EXIT_LOST


class BadSample(CosmosError, ValueError):
    """One sample cannot be used; it is counted under ``reason`` and replaced.

    ``reason`` is one or two words such as ``undecodable``, ``too large`` or ``no caption``.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}" if detail else reason)

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


def is_lost_rank(error: BaseException) -> bool:
    """Return whether a collective failed because another rank is gone (PyTorch has no one class for it)."""
    return type(error).__name__ in ("DistError", "DistBackendError", "DistNetworkError", "DistStoreError") or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


_UNPRINTABLE = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200b\\u200e\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ud800-\\udfff]"
)


def printable(text: str) -> str:
    """``text`` with what would act on a terminal instead of being shown (control characters, turns of direction) as
    escapes.

    Newlines and tabs stay. What came with data, paths and names of others goes through here before it is printed.
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def did_you_mean(name: str, candidates: Sequence[str]) -> str:
    """Return `` Did you mean 'x'?`` for the nearest candidate, or an empty string."""
    close = get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def listed(names: Iterable[str], separator: str = ", ", limit: int = 4, total: int | None = None) -> str:
    """The first of some names, and how many there are beside; ``total`` where ``names`` are not all of them."""
    found = list(names)
    first = found[:limit]
    more = (len(found) if total is None else total) - len(first)
    return separator.join([*first, f"and {more:,} more"] if more else first)


def first_line(error: BaseException) -> str:
    """An error's kind and the first line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
