"""What the pictures of a folder hold: hashes that tell other pictures of the same names, and marks that tell when to
hash anew.

The sizes of all pictures are hashed, and the first bytes of some that are evenly spread, with their captions; of all,
and every byte, where that is asked for. The mark of a picture is made of its size and times, and those of its caption.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.data.folder.index import FolderIndex
from cosmos_ssl.data.scan import spread
from cosmos_ssl.data.storage import retrying
from cosmos_ssl.liveness import OnProgress

THREADS = 16
YOUNG = 2_000_000_000
"""Nanoseconds: what was changed so shortly before it was looked at may change again without another time."""
MARKED, HASHED = 1 << 14, 1 << 12
"""Pictures that are looked at each time their folder or table is opened, and that are hashed when it is indexed."""
HEAD = 1 << 16
"""Bytes of a picture that are hashed."""
CHUNK = 1024
"""Pictures that a thread is given at once."""
_T = TypeVar("_T")


def mark_of(found: os.stat_result) -> int:
    """Both times in one number: unpacking an archive puts back the time of change, but not that of the entry itself."""
    return (found.st_mtime_ns + found.st_ctime_ns) & (2**63 - 1)


def look_into(
    root: bytes, index: FolderIndex, *, full_hash: bool, progress: OnProgress
) -> tuple[dict[str, str], NDArray[np.int64]]:
    """Hashes of what is in ``pictures`` and ``captions``, and in every byte of them (``full_pictures``,
    ``full_captions``) where asked for.

    Empty where there are none, or were not asked for. Then the marks of some pictures, or of all. Raises OSError where
    storage fails.
    """
    texts, everything = index.notes.texts > 0, range(len(index))
    whole = everything[: len(index) * full_hash]
    marked, hashed = spread(len(index), len(index) if full_hash else MARKED), spread(len(index), HASHED)
    total, done = sum(-(-len(places) // CHUNK) for places in (marked, everything, hashed, whole)), 0

    def of_parts(function: Callable[[list[bytes]], _T], places: Sequence[int]) -> Iterator[_T]:
        nonlocal done
        look = lambda part: retrying(lambda: function(index.paths(part, root + b"/")), os.fsdecode(root))  # noqa: E731
        for found in threads.map(look, in_chunks(places)):
            done += 1
            progress(done, total)
            yield found

    hashes = {name: hashlib.sha256() for name in ("pictures", "captions", "full_pictures", "full_captions")}
    with ThreadPoolExecutor(THREADS) as threads:  # files on a network file system are waited for
        # marks first, so that what changes meanwhile is seen later
        marks = list(of_parts(partial(_marks, texts=texts, now=time.time_ns()), marked))
        for sizes in of_parts(_sizes, everything):
            hashes["pictures"].update(sizes)
        for before, places, length in (("", hashed, HEAD), ("full_", whole, -1)):
            for own, theirs in of_parts(partial(_digests, texts=texts, length=length), places):
                hashes[f"{before}pictures"].update(own)
                hashes[f"{before}captions"].update(theirs)
    wanted = {"captions": texts, "full_pictures": full_hash, "full_captions": full_hash and texts}
    found = {name: digest.hexdigest()[:16] if wanted.get(name, True) else "" for name, digest in hashes.items()}
    return found, np.concatenate(marks)


def is_unchanged(root: bytes, index: FolderIndex) -> bool:
    """Return whether the marked pictures and their captions have the sizes and times that they had."""
    texts, marks = index.notes.texts > 0, index.columns["marks"]
    places = spread(len(index), len(marks))

    def same(part: Sequence[int]) -> bool:
        try:
            found = _marks(index.paths([places[i] for i in part], root + b"/"), texts)
            return bool((found == marks[part[0] : part[-1] + 1]).all())
        except OSError:
            return False

    with ThreadPoolExecutor(THREADS) as threads:
        return all(threads.map(same, in_chunks(range(len(places)))))


def in_chunks(places: Sequence[int]) -> Iterator[Sequence[int]]:
    """Places in pieces of ``CHUNK``."""
    return (places[start : start + CHUNK] for start in range(0, len(places), CHUNK))


def _sizes(paths: Sequence[bytes]) -> bytes:
    return np.array([os.stat(path).st_size for path in paths], np.int64).tobytes()  # noqa: PTH116


def _marks(paths: Sequence[bytes], texts: bool, now: int | None = None) -> NDArray[np.int64]:
    """One number a picture, and its caption with ``texts``; -1 for one that may change after ``now`` without another
    time.
    """
    marks = []
    for path in paths:
        mark = newest = 0
        for name in (path, _caption(path))[: 1 + texts]:
            try:
                found = os.stat(name)  # noqa: PTH116  (a Path holds no bytes)
            except FileNotFoundError:
                if name == path:
                    raise
                continue  # a picture without a caption
            mark = (mark * 31 + mark_of(found) + found.st_size * 1_000_003) & (2**63 - 1)
            newest = max(newest, found.st_ctime_ns)
        marks.append(-1 if now is not None and abs(now - newest) < YOUNG else mark)
    return np.array(marks, np.int64)


def _digests(paths: Sequence[bytes], texts: bool, length: int) -> tuple[bytes, bytes]:
    """The digests of the first bytes of these pictures (-1: of all), and of their captions, end to end."""
    own = b"".join(_digest(path, length) for path in paths)
    return own, b"".join(_digest(_caption(path), length) for path in paths) if texts else b""


def _caption(picture: bytes) -> bytes:
    return picture.rpartition(b".")[0] + b".txt"


def _digest(path: bytes, length: int) -> bytes:
    """Nothing where there is no regular file: a pipe would be waited for without end."""
    if not os.path.isfile(path):  # noqa: PTH113
        return bytes(32)
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123
        return (hashlib.file_digest(file, "sha256") if length < 0 else hashlib.sha256(file.read(length))).digest()
