"""What the rows of a table hold: hashes that tell other data of the same names, and marks that tell when to hash anew.

All names of pictures, captions and labels are hashed, the sizes of all pictures, and the first bytes of some that are
evenly spread; every byte of all, where that is asked for. The mark of a picture in a file of its own is made of its
size and times; a picture that is not there has one, too.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.data.folder.content import CHUNK, HASHED, HEAD, MARKED, THREADS, YOUNG, in_chunks, mark_of
from cosmos_ssl.data.scan import spread
from cosmos_ssl.data.storage import retrying
from cosmos_ssl.liveness import OnProgress
from cosmos_ssl.pictures import read_regular

_T = TypeVar("_T")


class Rows(Protocol):
    """Rows as hashes are made of them."""

    embedded: bool

    def __len__(self) -> int: ...

    def picture(self, row: int) -> bytes | str | None:
        """The picture, the path of its file, or None where there is neither."""
        ...

    def sizes(self) -> Iterator[NDArray[np.int64]]:
        """Sizes of pictures that lie in the table, in pieces; -1 where there is none."""
        ...

    def values(self) -> Iterator[list[Any]]:
        """All that is no picture, in pieces: captions, labels, and paths of pictures as they are written."""
        ...


def look_into(rows: Rows, *, full_hash: bool, progress: OnProgress) -> tuple[dict[str, str], NDArray[np.int64]]:
    """Hashes by name: ``values``, ``pictures``, and ``full_pictures`` where asked for; and the marks of some pictures,
    or of all. Raises OSError where storage fails.
    """
    everything, found = range(len(rows)), {"values": hashlib.sha256(), "pictures": hashlib.sha256()}
    marked = _marked(rows, full_hash)
    total = 2 + sum(-(-len(places) // CHUNK) for places in (marked, everything, everything[: len(rows) * full_hash]))
    done = 0
    with ThreadPoolExecutor(THREADS) as threads:  # files on a network file system are waited for

        def of_parts(function: Callable[[bytes | str | None], _T], places: Sequence[int]) -> Iterator[list[_T]]:
            nonlocal done
            for found in threads.map(lambda part: [function(rows.picture(row)) for row in part], in_chunks(places)):
                done += 1
                progress(min(done, total), total)
                yield found

        now = time.time_ns()
        # marks first, so that what changes meanwhile is seen later
        marks = [mark for part in of_parts(lambda picture: _mark(picture, now), marked) for mark in part]
        for values in rows.values():
            found["values"].update("".join(f"{json.dumps(value, default=str)}\n" for value in values).encode())
            progress(min(done, total), total)
        files = of_parts(_size, everything[: len(rows) * (not rows.embedded)])
        for sizes in rows.sizes() if rows.embedded else (np.array(part, np.int64) for part in files):
            found["pictures"].update(sizes.tobytes())
        for digests in of_parts(lambda picture: _digest(picture, HEAD), spread(len(rows), HASHED)):
            found["pictures"].update(b"".join(digests))
        if full_hash:
            found["full_pictures"] = hashlib.sha256()
            for digests in of_parts(lambda picture: _digest(picture, None), everything):
                found["full_pictures"].update(b"".join(digests))
    return {name: digest.hexdigest()[:16] for name, digest in found.items()}, np.array(marks, np.int64)


def is_unchanged(rows: Rows, marks: NDArray[np.int64]) -> bool:
    """Return whether the marked pictures have the sizes and times that they had."""
    places = spread(len(rows), len(marks))
    with ThreadPoolExecutor(THREADS) as threads:
        found = threads.map(lambda row: _mark(rows.picture(row)), places)
        try:
            return all(now == was for now, was in zip(found, marks.tolist(), strict=True))
        except OSError:
            return False


def names_nothing(error: OSError | ValueError) -> bool:
    """Return whether there is no such file, nor can be: no failure of storage that another attempt may mend."""
    if isinstance(error, ValueError):  # a NUL in a path; BadSample
        return True
    never = (errno.ENAMETOOLONG, errno.ELOOP)
    return isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError) or error.errno in never


def _marked(rows: Rows, full_hash: bool) -> Sequence[int]:
    return range(0) if rows.embedded else spread(len(rows), len(rows) if full_hash else MARKED)


def _stat(path: str) -> os.stat_result | None:
    def look() -> os.stat_result | None:
        try:
            return os.stat(path)  # noqa: PTH116
        except (OSError, ValueError) as error:
            if names_nothing(error):
                return None
            raise

    return retrying(look, path)


def _mark(picture: bytes | str | None, now: int | None = None) -> int:
    """One number; 0 where there is no file, -1 for one that may change after ``now`` without another time."""
    found = _stat(picture) if isinstance(picture, str) else None
    if found is None:
        return 0
    if now is not None and abs(now - found.st_ctime_ns) < YOUNG:
        return -1
    return (mark_of(found) + found.st_size * 1_000_003) & (2**63 - 1)


def _size(picture: bytes | str | None) -> int:
    """Bytes of the file; -1 where there is none."""
    found = _stat(picture) if isinstance(picture, str) else None
    return -1 if found is None else found.st_size


def _digest(picture: bytes | str | None, length: int | None) -> bytes:
    """Of the first bytes, or of all; of nothing where there is no regular file."""
    if isinstance(picture, str):
        picture = _file(picture, length)
    return hashlib.sha256((picture or b"")[:length]).digest()


def _file(path: str, length: int | None) -> bytes:
    def read() -> bytes:
        try:
            return _head(path, length)
        except (OSError, ValueError) as error:
            if names_nothing(error):
                return b""
            raise

    return retrying(read, path)


def _head(path: str, length: int | None) -> bytes:
    """The first bytes of a regular file, or all; nothing of a pipe, which would be waited for without end."""
    if length is None:
        return read_regular(Path(path))
    if not os.path.isfile(path):  # noqa: PTH113
        return b""
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123
        return file.read(length)
