"""What is kept between runs: where it may lie, who makes it, and indexes as columns that are mapped, not read."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.files import check_seal, seal, written_whole
from cosmos_ssl.liveness import alive


class _Index(Protocol):
    def save(self, path: Path) -> None: ...


_T = TypeVar("_T", bound=_Index)
_WAIT_SECONDS = 5.0  # for a lock, before it is said again that this process lives


def cache_root() -> Path:
    """The project's cache folder: ``$XDG_CACHE_HOME/cosmos_ssl``, by default ``~/.cache/cosmos_ssl``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cosmos_ssl"


def digest(lines: Iterable[str], between: str = "\n") -> str:
    """A short hash of some texts, which may hold bytes that are no UTF-8."""
    return hashlib.sha256(between.join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]


@contextmanager
def lock(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a lock file, so that work is done once; where the file system has no locks it may be done twice.

    ``waiting`` is called once, where another process has held it for some seconds.
    """
    from filelock import FileLock, Timeout

    held = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while not held.is_locked:
            alive()  # whoever holds it is watched over itself
            try:
                held.acquire(timeout=_WAIT_SECONDS)
            except Timeout:
                if waiting is not None:
                    waiting()
                    waiting = None
    except (OSError, NotImplementedError):  # no permission, a full disk; a Lustre without flock
        yield
        return
    try:
        yield
    finally:
        held.release()


# ---------------------------------------------------------------------------- which index, made by whom


def kept(places: Sequence[Path], fresh: Callable[[Path], _T | None], make: Callable[[Path | None], _T]) -> _T:
    """The index that is ``fresh`` at one of these places, else a new one, saved at the first that can be written.

    ``make`` is called under a lock with that place, or with None where nothing can be written.
    """
    for path in places:
        if (found := fresh(path)) is not None:
            return found
    place = _first_writable(places)
    if place is None:
        return make(None)
    with lock(place.with_suffix(".lock")):
        found = fresh(place)
        if found is None:
            made = make(place)
            made.save(place)
            found = fresh(place)
        return made if found is None else found


_only_looking: ContextVar[bool] = ContextVar("only_looking", default=False)


@contextmanager
def only_looking() -> Iterator[None]:
    """While entered, what is indexed is kept in memory alone."""
    token = _only_looking.set(True)
    try:
        yield
    finally:
        _only_looking.reset(token)


def _first_writable(places: Sequence[Path]) -> Path | None:
    """The first of these files that may be made: in a folder of another user at the last place alone."""
    if _only_looking.get():
        return None
    for path in places:
        there = next(folder for folder in path.parents if folder.exists())
        ours = not hasattr(os, "getuid") or there.stat().st_uid == os.getuid()
        if (ours or path == places[-1]) and _is_writable(path.parent, there):
            return path
    return None


def _is_writable(folder: Path, there: Path) -> bool:
    """Return whether files can be made in a folder, or below what is ``there`` of it.

    What is marked read-only is left alone, even by root.
    """
    if not there.stat().st_mode & 0o222:
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


# ---------------------------------------------------------------------------- the form of an index


def save_columns(path: Path, magic: bytes, head: Any, columns: Iterable[NDArray[Any]], align: int = 64) -> None:
    """Write ``magic``, a head (plain values) and columns: the first at a multiple of 64 bytes, others of ``align``."""
    text = json.dumps(head).encode()
    with written_whole(path) as file:
        file.write(magic + len(text).to_bytes(8, "little") + text)
        file.write(bytes(-file.tell() % 64))
        for column in columns:
            file.write(bytes(-file.tell() % align))
            file.write(np.ascontiguousarray(column).data)
        seal(file)


def open_head(path: Path, magic: bytes, *, verify: bool) -> tuple[Any, int]:
    """The head of such a file, once it is read and found sound (``verify``), and where the first column begins.

    Raises OSError or ValueError where there is none of this form.
    """
    if verify:
        check_seal(path)
    with path.open("rb") as file:
        if file.read(len(magic)) != magic:
            raise ValueError(f"{path} is no index of this form")
        head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return head, -(-file.tell() // 64) * 64
