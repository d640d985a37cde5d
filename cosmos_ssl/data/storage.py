"""Bytes of shards: local files by pread, fsspec URLs by blocks of megabytes in a bounded local cache."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from stat import S_ISREG
from typing import Any, NamedTuple, TypeVar

from cosmos_ssl.data.cache import lock
from cosmos_ssl.errors import BadSample, DataError, UserError
from cosmos_ssl.files import part_name
from cosmos_ssl.liveness import alive

RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Waits between the attempts at a read."""
GIVE_UP_SECONDS = 180.0
"""No further attempt begins so long after the first one: a server that never answers costs a time-out each."""
REQUEST_SECONDS = 120.0
"""A request that is not answered in whole after this time has failed: a block comes at 70 kB/s at least."""
CONNECT_SECONDS = 15.0
"""Storage that has not answered this process once must do so within this time, unless ``CONNECT_VARIABLE`` gives
another one."""
CONNECT_VARIABLE = "COSMOS_SSL_CONNECT_TIMEOUT"
STILL_SECONDS = 300.0
"""Local storage from which nothing at all comes for so long has hung."""
BLOCK_BYTES = 8 << 20
_STAMPS = (
    *("ETag", "etag", "md5Hash", "mtime", "LastModified", "updated", "created"),
    *("Last-Modified", "Content-MD5", "Digest", "modify"),
)
"""What file systems call the marks that change with a file's content, the best of each first."""
UNMARKED = "run "
"""How the stamps begin of what may have changed, or not, before the next run: nothing of it is used again then."""
_RUN = secrets.token_hex(8)
_answered: set[str] = set()
"""Endpoints (scheme and host or bucket) that have answered this process."""
_OPEN_FILES = 64

_T = TypeVar("_T")


class Stat(NamedTuple):
    """Size of a shard in bytes, and a mark that changes when its content does; where its server gives none, one of this
    run alone.
    """

    size: int
    stamp: str


def is_local(url: str) -> bool:
    """Return whether a URL names a file of this machine."""
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

    Raises FileNotFoundError where its storage says that there is none, DataError where it is a folder or a pipe,
    OSError where storage fails.
    """
    if is_local(url):
        try:
            found = bounded(local_path(url).stat, url, STILL_SECONDS)
        except ValueError as error:  # a NUL
            raise DataError(f"data: {url!r} is no path") from error
        if not S_ISREG(found.st_mode):  # a pipe would be waited for without end
            raise DataError(f"data: {url} is no regular file")
        times = f"{found.st_mtime_ns} {found.st_ctime_ns}"  # unpacking puts the first back, not the second
        return Stat(found.st_size, times)
    info = request(url, _info)
    if info is None:
        raise FileNotFoundError(errno.ENOENT, "no such file", url)
    if info.get("size") is None:
        raise DataError(f"data: {url}: its server does not tell its size")
    return Stat(int(info["size"]), next((str(info[key]) for key in _STAMPS if info.get(key)), UNMARKED + _RUN))


def _info(system: Any, path: str) -> Any:
    """Return what a file system knows of a file, None where it says that there is none.

    Raises its error where it cannot say.
    """
    try:
        return system.info(path)
    except FileNotFoundError as error:
        if error.__cause__ is None or not _is_lost(error.__cause__):
            return None
        raise error.__cause__ from None  # fsspec's HTTP says "not found" of whatever goes wrong
    except Exception as error:
        if type(error).__module__ == "ftplib" and str(error).startswith("550"):
            return None
        raise


def _is_lost(error: BaseException) -> bool:
    """Return whether a server did not answer, or answered something else than that a file is not there."""
    status = getattr(error, "status", None)
    if status is not None:
        return status not in (404, 410)
    lost = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
    return lost or type(error).__module__.partition(".")[0] == "aiohttp"


def read_whole(url: str, limit: int) -> bytes:
    """A small file. Raises as ``stat``, and DataError where it holds more than ``limit`` bytes."""
    size = stat(url).size
    if size > limit:
        raise DataError(f"data: {url} holds {size:,} bytes; at most {limit:,} are read")
    return retrying(local_path(url).read_bytes, url) if is_local(url) else fetch(url, 0, size) if size else b""


def retrying(read: Callable[[], _T], what: str) -> _T:
    """Call ``read`` until it succeeds, with growing waits; the last OSError is raised, with ``what`` in it."""
    began, attempts = time.monotonic(), 0
    while True:
        try:
            found = read()
            _Reads.count += 1
            return found
        except (UserError, BadSample):
            raise
        except Exception as error:  # object stores raise errors of their own for a lost connection
            attempts += 1
            if attempts > len(RETRY_SECONDS) or time.monotonic() - began > GIVE_UP_SECONDS:
                said = getattr(error, "strerror", None) or str(error) or type(error).__name__
                raise OSError(errno.EIO, f"{what}: {said} ({attempts} attempts)") from error
            time.sleep(RETRY_SECONDS[attempts - 1])


class _Reads:
    """Reads of this process that have succeeded."""

    count = 0


def unless_still(call: Callable[[], _T], what: str) -> _T:
    """``call()``, which reads much, bounded by ``STILL_SECONDS`` in which not one of this process's reads succeeds."""
    return bounded(call, what, STILL_SECONDS, lambda: _Reads.count)


def bounded(call: Callable[[], _T], what: str, seconds: float, moved: Callable[[], int] = lambda: 0) -> _T:
    """``call()``. Raises TimeoutError, an OSError, after ``seconds`` in which ``moved()`` has stayed the same.

    Nothing ends a read that hangs in the system or in a library: it is made by a thread of its own, which is then left
    to itself.
    """
    done: Future[_T] = Future()

    def work() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, name="storage", daemon=True).start()
    last = moved()
    while True:
        try:
            return done.result(seconds)
        except TimeoutError:
            if done.done():  # the call's own
                raise
            now = moved()
            if now == last:
                raise TimeoutError(errno.ETIMEDOUT, f"no answer within {seconds:g} s", what) from None
            last = now


def request(url: str, call: Callable[[Any, str], _T]) -> _T:
    """``call(file system, path)`` of a remote URL, retried.

    Raises OSError once all attempts failed or timed out, or no attempt at a first answer succeeded in time.
    """
    said = ["no answer"]

    def attempt() -> _T:
        system, path = filesystem(url)
        try:
            return call(system, path)
        except Exception as error:
            type(system).clear_instance_cache()  # the next attempt connects anew: FTP keeps its one connection
            said.append(str(error) or type(error).__name__)
            raise

    def attempts() -> _T:
        return retrying(lambda: bounded(attempt, url, REQUEST_SECONDS), url)

    if has_answered(url):
        return attempts()
    try:
        found = bounded(attempts, url, seconds := connect_seconds())
    except TimeoutError:
        advice = (
            f"nothing succeeded within {seconds:g} s: check the URL and its endpoint; {CONNECT_VARIABLE} allows more"
        )
        raise OSError(errno.EIO, f"{url}: {said[-1]} ({advice})") from None
    note_answer(url)
    return found


def connect_seconds() -> float:
    """Return how long to wait for the first answer of an endpoint, in seconds.

    Raises:
        UserError: ``CONNECT_VARIABLE`` is no number above zero.
    """
    text = os.environ.get(CONNECT_VARIABLE)
    try:
        seconds = CONNECT_SECONDS if text is None else float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise UserError(f"the environment variable {CONNECT_VARIABLE} is {text!r}, expected seconds, such as 60")
    return seconds


def has_answered(url: str) -> bool:
    """Return whether the endpoint of a URL has answered this process."""
    return _endpoint(url) in _answered


def note_answer(url: str) -> None:
    """Note that the endpoint of a URL has answered: from now on it is waited for."""
    _answered.add(_endpoint(url))


def _endpoint(url: str) -> str:
    return "/".join(url.split("/", 3)[:3])


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
        return _unpickled_reader, (self._cache, frozenset(_answered))

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


def _unpickled_reader(cache: BlockCache | None, answered: frozenset[str]) -> Reader:
    """A worker process waits for the endpoints that have answered its parent."""
    _answered.update(answered)
    return Reader(cache)


def fetch(url: str, start: int, stop: int) -> bytes:
    """One request for bytes ``start`` to ``stop`` of a remote shard, retried."""
    alive()

    def read(system: Any, path: str) -> bytes:
        data: bytes = system.cat_file(path, start=start, end=stop)
        if len(data) != stop - start:
            raise OSError(errno.EIO, f"{len(data):,} of {stop - start:,} bytes came")
        return data

    return request(url, read)


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
        name = hashlib.sha256(f"{url} {found.size} {found.stamp}".encode("utf-8", "surrogateescape")).hexdigest()[:24]
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
        # several workers want the same block at once: one fetches it
        with lock(self._folder / f"{int(name[:2], 16) % 64}.lock"):
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
            with (part := part_name(self._folder)).open("xb") as file:
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
                own = [e for e in os.scandir(self._folder) if e.name.endswith((".block", ".part"))]
                entries = [(e.stat().st_mtime, e.stat().st_size, e.path) for e in own]
                total = sum(size for _, size, _ in entries)
                for _, size, path in sorted(entries):
                    if total <= self._limit * 3 // 4:
                        break
                    Path(path).unlink()
                    total -= size
        except (Timeout, OSError, NotImplementedError):
            return
