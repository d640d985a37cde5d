"""Bytes of shards: local files by pread, fsspec URLs by blocks of megabytes in a bounded local cache."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import IO, Any, NamedTuple, TypeVar

from cosmos_ssl.errors import BadSample, DataError, UserError
from cosmos_ssl.functional_pulse import alive

RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Waits between the attempts at a read."""
BLOCK_BYTES = 8 << 20
_OPEN_FILES = 64

_T = TypeVar("_T")


class Stat(NamedTuple):
    """Size of a shard in bytes, and a mark that changes when its content does."""

    size: int
    stamp: str


def cache_root() -> Path:
    """The project's cache folder: ``$XDG_CACHE_HOME/cosmos_ssl``, by default ``~/.cache/cosmos_ssl``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cosmos_ssl"


def is_local(url: str) -> bool:
    """Whether a URL names a file of this machine."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> Path:
    """The path behind a local URL."""
    return Path(url.removeprefix("file://")).expanduser()


def shard_name(url: str) -> str:
    """The last part of a URL, by which people know a shard."""
    return url.rpartition("/")[2]


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it; fsspec keeps one instance a process."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # the protocol's own package is missing, or nobody knows it
        raise DataError(f"data: {url}: {error}") from error
    return system, path


def stat(url: str) -> Stat:
    """Size and stamp of a shard.

    Raises FileNotFoundError where there is none, DataError where it is a folder or a pipe, OSError where storage fails.
    """
    if is_local(url):
        found = local_path(url).stat()
        if not S_ISREG(found.st_mode):  # a pipe would be waited for without end
            raise DataError(f"data: {url} is no regular file")
        return Stat(found.st_size, f"{found.st_mtime_ns} {found.st_ctime_ns}")  # unpacking puts the first back, not the second
    system, path = filesystem(url)
    info = system.info(path)
    stamp = next((str(info[k]) for k in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "updated", "created") if info.get(k)), "")
    return Stat(int(info["size"]), stamp)


def retrying(read: Callable[[], _T], what: str) -> _T:
    """Call ``read`` until it succeeds, with growing waits; the last OSError is raised, with ``what`` in it."""
    for wait in (*RETRY_SECONDS, None):
        try:
            return read()
        except (UserError, BadSample):
            raise
        except Exception as error:  # object stores raise errors of their own for a lost connection
            if wait is None:
                said = getattr(error, "strerror", None) or str(error) or type(error).__name__
                raise OSError(errno.EIO, f"{what}: {said} ({len(RETRY_SECONDS) + 1} attempts)") from error
            time.sleep(wait)
    raise AssertionError


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold a lock file, so that work is done once; where the file system has no locks it may be done twice."""
    from filelock import FileLock, Timeout

    held = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while not held.is_locked:
            alive()  # whoever holds it is watched over itself
            with suppress(Timeout):
                held.acquire(timeout=5)
    except (OSError, NotImplementedError):  # no permission, a full disk; a Lustre without flock
        yield
        return
    try:
        yield
    finally:
        held.release()


def is_writable(folder: Path) -> bool:
    """Whether files can be made there. A folder marked read-only is left alone, even by root."""
    there = next((f for f in (folder, *folder.parents) if f.exists()), folder)
    if not there.stat().st_mode & 0o222:
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def first_writable(places: Sequence[Path]) -> Path | None:
    """The first of these files that may be made, None where none can: in a folder of another user at the last place alone."""
    for path in places[:-1]:
        there = next(folder for folder in path.parents if folder.exists())
        if (not hasattr(os, "getuid") or there.stat().st_uid == os.getuid()) and is_writable(path.parent):
            return path
    return places[-1] if is_writable(places[-1].parent) else None


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write ``path`` into: under a temporary name beside it until it is whole and on the disk. Raises OSError."""
    part = _part(path.parent)
    with part.open("x+b") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def _part(folder: Path) -> Path:
    """A name for a file that is not whole. It is opened as any file, so that it is for whom the umask says (tempfile's are not)."""
    return folder / f"tmp{secrets.token_hex(8)}.part"


class _File:
    """An open file of this process; closed when nobody reads it any more."""

    __slots__ = ("handle",)

    def __init__(self, path: Path) -> None:
        self.handle = -1
        self.handle = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)


class Reader:
    """Reads spans of many shards; a few local files stay open. Threads may share one, pickled copies open their own."""

    def __init__(self, cache: BlockCache | None = None) -> None:
        self._cache = cache
        self._files: OrderedDict[str, _File] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._cache,)

    def read(self, url: str, found: Stat, offset: int, count: int) -> bytes:
        """``count`` bytes from ``offset``. Raises OSError once all attempts failed."""
        if is_local(url):
            return retrying(lambda: self._pread(url, offset, count), url)
        if self._cache is None:
            return fetch(url, offset, offset + count)
        return self._cache.read(url, found, offset, count)

    def _pread(self, url: str, offset: int, count: int) -> bytes:
        file = self._files.pop(url, None) or _File(local_path(url))
        data = os.pread(file.handle, count, offset)
        if len(data) < count:  # the next attempt opens the file again
            raise OSError(errno.EIO, f"byte {offset + count:,} was indexed and is not there")
        self._files[url] = file
        while len(self._files) > _OPEN_FILES:
            self._files.popitem(last=False)
        return data


def fetch(url: str, start: int, stop: int) -> bytes:
    """One request for bytes ``start`` to ``stop`` of a remote shard, retried."""
    alive()

    def request() -> bytes:
        system, path = filesystem(url)
        data: bytes = system.cat_file(path, start=start, end=stop)
        if len(data) != stop - start:
            raise OSError(errno.EIO, f"{len(data):,} of {stop - start:,} bytes came")
        return data

    return retrying(request, url)


class BlockCache:
    """Whole blocks of remote shards as files of a folder that all processes of a machine share.

    The least recently used blocks go when ``limit`` bytes are exceeded. Where the folder cannot be
    written (a full disk), blocks are fetched and not kept.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._written = 0

    def read(self, url: str, found: Stat, offset: int, count: int) -> bytes:
        """``count`` bytes from ``offset``, through the blocks that hold them."""
        name = hashlib.sha256(f"{url} {found.size} {found.stamp}".encode()).hexdigest()[:24]
        parts = []
        for block in range(offset // BLOCK_BYTES, (offset + count - 1) // BLOCK_BYTES + 1):
            first = block * BLOCK_BYTES
            start, stop = max(offset - first, 0), min(offset + count - first, BLOCK_BYTES)
            parts.append(self._span(f"{name}-{block}", url, first, min(first + BLOCK_BYTES, found.size), start, stop))
        return b"".join(parts)

    def _span(self, name: str, url: str, first: int, last: int, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` of the block that holds ``first`` to ``last`` of the shard."""
        data = self._stored(name, start, stop)
        if data is not None:
            return data
        with lock(self._folder / f"{int(name[:2], 16) % 64}.lock"):  # several workers want the same block at once: one fetches it
            data = self._stored(name, start, stop)
            if data is None:
                block = fetch(url, first, last)
                self._store(name, block)
                data = block[start:stop]
        return data

    def _stored(self, name: str, start: int, stop: int) -> bytes | None:
        path = self._folder / f"{name}.block"
        try:
            with path.open("rb", buffering=0) as file:
                os.utime(file.fileno())  # the time of the last use
                data = os.pread(file.fileno(), stop - start, start)
        except OSError:
            return None
        return data if len(data) == stop - start else None

    def _store(self, name: str, block: bytes) -> None:
        try:
            with (part := _part(self._folder)).open("xb") as file:
                file.write(block)
            part.replace(self._folder / f"{name}.block")
        except OSError:
            return
        self._written += len(block)
        self._trim()

    def _trim(self) -> None:
        """Now and then delete the oldest blocks; one process at a time."""
        if self._written < self._limit // 256:
            return
        from filelock import FileLock, Timeout

        self._written = 0
        try:
            with FileLock(self._folder / "trim.lock", timeout=0):
                entries = [(e.stat().st_mtime, e.stat().st_size, e.path) for e in os.scandir(self._folder) if not e.name.endswith(".lock")]
                total = sum(size for _, size, _ in entries)
                for _, size, path in sorted(entries):
                    if total <= self._limit * 3 // 4:
                        break
                    Path(path).unlink()
                    total -= size
        except (Timeout, OSError, NotImplementedError):
            return
