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
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.data.storage import retrying
from cosmos_ssl.functional.pulse import OnProgress

if TYPE_CHECKING:
    from cosmos_ssl.data.folder_index import FolderIndex

THREADS = 16
YOUNG = 2_000_000_000
"""Nanoseconds: what was changed so shortly before it was looked at may change again without another time."""
_MARKED, _HASHED = 1 << 14, 1 << 12
"""Pictures of a folder that are looked at each time it is opened, and that are hashed when it is indexed."""
_HEAD = 1 << 16
"""Bytes of a picture that are hashed."""
_CHUNK = 1024
_T = TypeVar("_T")


def mark_of(found: os.stat_result) -> int:
    """Both times in one number: unpacking an archive puts back the time of change, but not that of the entry itself."""
    return (found.st_mtime_ns + found.st_ctime_ns) & (2**63 - 1)


def look_into(
    root: bytes, index: FolderIndex, *, full_hash: bool, progress: OnProgress | None
) -> tuple[dict[str, str], NDArray[np.int64]]:
    """Hashes of what is in ``pictures`` and ``captions``, and in every byte of them (``full_pictures``,
    ``full_captions``) where asked for.

    Empty where there are none, or were not asked for. Then the marks of some pictures, or of all. Raises OSError where
    storage fails.
    """
    files, everything = _Files(root, index), range(len(index))
    marked, hashed = _spread(len(index), len(index) if full_hash else _MARKED), _spread(len(index), _HASHED)
    total, done = (
        sum(-(-len(places) // _CHUNK) for places in (marked, everything, hashed, everything[: len(index) * full_hash])),
        0,
    )

    def of_parts(function: Callable[[Sequence[int]], _T], places: Sequence[int]) -> Iterator[_T]:
        nonlocal done
        for found in threads.map(lambda part: retrying(lambda: function(part), os.fsdecode(root)), _parts(places)):
            done += 1
            if progress is not None:
                progress(done, total)
            yield found

    wanted = {
        "pictures": True,
        "captions": files.texts,
        "full_pictures": full_hash,
        "full_captions": full_hash and files.texts,
    }
    hashes = {name: hashlib.sha256() for name in wanted}
    with ThreadPoolExecutor(THREADS) as threads:  # files on a network file system are waited for
        marks = list(
            of_parts(partial(files.marks, now=time.time_ns()), marked)
        )  # first, so that what changes meanwhile is seen later
        for sizes in of_parts(files.sizes, everything):
            hashes["pictures"].update(sizes)
        for before, places in (("", hashed), ("full_", everything[: len(index) * full_hash])):
            for own, theirs in of_parts(partial(files.hashes, whole=bool(before)), places):
                hashes[f"{before}pictures"].update(own)
                hashes[f"{before}captions"].update(theirs)
    return {name: hashes[name].hexdigest()[:16] if wanted[name] else "" for name in wanted}, np.concatenate(marks)


def is_unchanged(root: bytes, index: FolderIndex) -> bool:
    """Whether the marked pictures and their captions have the sizes and times that they had."""
    files, marks = _Files(root, index), index.columns["marks"]
    places = _spread(len(index), len(marks))

    def same(part: Sequence[int]) -> bool:
        try:
            return bool((files.marks([places[i] for i in part]) == marks[part[0] : part[-1] + 1]).all())
        except OSError:
            return False

    with ThreadPoolExecutor(THREADS) as threads:
        return all(threads.map(same, _parts(range(len(places)))))


def _spread(count: int, most: int) -> Sequence[int]:
    """Evenly spread places, ``most`` of them or all."""
    return range(count) if most >= count else [i * count // most for i in range(most)]


def _parts(places: Sequence[int]) -> Iterator[Sequence[int]]:
    return (places[start : start + _CHUNK] for start in range(0, len(places), _CHUNK))


class _Files:
    """Sizes, marks and hashes of the pictures at some places of an index, and of the captions where there are any."""

    def __init__(self, root: bytes, index: FolderIndex) -> None:
        self._root, self._index = root, index
        self.texts = index.notes.texts > 0

    def _paths(self, places: Sequence[int]) -> list[bytes]:
        return [self._root + b"/" + path for path in self._index.paths(places)]

    def sizes(self, places: Sequence[int]) -> bytes:
        return np.array([os.stat(path).st_size for path in self._paths(places)], np.int64).tobytes()  # noqa: PTH116

    def marks(self, places: Sequence[int], now: int | None = None) -> NDArray[np.int64]:
        """One number a picture; -1 for one that may change after ``now`` without another time."""
        marks = []
        for path in self._paths(places):
            mark = newest = 0
            for name in (path, _caption(path))[: 1 + self.texts]:
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

    def hashes(self, places: Sequence[int], *, whole: bool) -> tuple[bytes, bytes]:
        """The digests of these pictures, and of their captions, end to end."""
        paths = self._paths(places)
        own = b"".join(_digest(path, whole) for path in paths)
        return own, b"".join(_digest(_caption(path), whole) for path in paths) if self.texts else b""


def _caption(picture: bytes) -> bytes:
    return picture.rpartition(b".")[0] + b".txt"


def _digest(path: bytes, whole: bool) -> bytes:
    """Of the first bytes of a file, or of all; of nothing where there is no regular one."""
    if not os.path.isfile(path):  # noqa: PTH113  (a pipe would be waited for without end)
        return bytes(32)
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123
        return hashlib.file_digest(file, "sha256").digest() if whole else hashlib.sha256(file.read(_HEAD)).digest()
