"""The index of a folder of pictures: which there are and of what class, as memory-mapped columns made by one scan.

14 million pictures are their names, end to end, and where each ends (8 bytes), never Python objects. A cached index is
one file, replaced as a whole.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.data.cache import open_head, save_columns

_MAGIC = b"cosmos-folder-2\n"
_COLUMNS = {
    "names": np.uint8,  # of all pictures, folder after folder, each in byte order and ended by a NUL
    "name_ends": np.int64,  # where the NUL of each picture stands
    "folders": np.uint8,  # paths of all folders from the root, '/' between, each ended by a NUL
    "folder_ends": np.int64,
    "picture_ends": np.int64,  # pictures up to and with each folder
    "classes": np.int32,  # number of each folder's class, -1 where it has none
    "stamps": np.int64,  # what the times of each folder's last change make, -1 where they cannot be relied on
    "marks": np.int64,  # the same of some evenly spread pictures, or of all
}


def shown(path: bytes) -> str:
    """A path for people and for JSON; bytes that are no UTF-8 come as ``\\xff``."""
    return path.decode("utf-8", "backslashreplace")


@dataclass(slots=True)
class FolderNotes:
    """What is left out or odd but stops nothing: counts, and a few paths as examples."""

    texts: int = 0
    """Text files, which may hold captions."""
    others: int = 0
    """Files that are no pictures, links to nothing, pipes and devices."""
    other_examples: list[str] = field(default_factory=list)
    loose: int = 0
    """Pictures beside the class folders, in none of them."""
    loose_examples: list[str] = field(default_factory=list)
    empty: int = 0
    """Class folders without pictures."""
    empty_examples: list[str] = field(default_factory=list)


class FolderIndex:
    """The pictures below one root, sorted by class, folder and name in byte order. Pickled copies map the file again.

    Classes are the folders directly below the root, numbered in byte order, with or without pictures (torchvision's
    numbers); where all pictures lie in the root itself there are none.
    """

    def __init__(self, head: Mapping[str, Any], columns: Mapping[str, NDArray[Any]], path: Path | None = None) -> None:
        self.path = path
        self.classes: tuple[str, ...] = tuple(head["classes"])
        self.digest: str = head["digest"]
        """Of all names and classes."""
        self.hashes: Mapping[str, str] = head["hashes"]
        """What ``look_into`` found."""
        self.notes = FolderNotes(**head["notes"])
        self.written: int = head["written"]
        self.columns = columns
        self._head = head

    def __len__(self) -> int:
        return len(self.columns["name_ends"])

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is not None:
            return partial(FolderIndex.open, verify=False), (self.path, self.digest)
        return FolderIndex, (self._head, self.columns)

    def looked_into(self, hashes: Mapping[str, str], marks: NDArray[np.int64]) -> FolderIndex:
        """The same pictures with what ``look_into`` found."""
        return FolderIndex(
            {**self._head, "hashes": hashes, "written": time.time_ns()}, {**self.columns, "marks": marks}
        )

    def locate(self, index: int) -> tuple[bytes, bytes, int]:
        """Folder (from the root), name and class (or -1) of picture ``index``. Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        folder = int(np.searchsorted(self.columns["picture_ends"], index, side="right"))
        name = _piece(self.columns["names"], self.columns["name_ends"], index)
        return self._folder(folder), name, int(self.columns["classes"][folder])

    def paths(self, places: Sequence[int], root: bytes = b"") -> list[bytes]:
        """Paths from the root, or with it, of the pictures at these places."""
        at = np.asarray(places)
        ends, names = self.columns["name_ends"], self.columns["names"]
        spans = zip(np.where(at > 0, ends[at - 1] + 1, 0).tolist(), ends[at].tolist(), strict=True)
        numbers = np.searchsorted(self.columns["picture_ends"], at, side="right").tolist()
        above = {number: root + (folder := self._folder(number)) + b"/" * bool(folder) for number in set(numbers)}
        return [above[at] + names[start:stop].tobytes() for at, (start, stop) in zip(numbers, spans, strict=True)]

    def _folder(self, number: int) -> bytes:
        return _piece(self.columns["folders"], self.columns["folder_ends"], number)

    def folders(self) -> list[bytes]:
        """Paths of all folders from the root."""
        return self.columns["folders"].tobytes().split(b"\0")[:-1]

    def class_sizes(self) -> NDArray[np.int64]:
        """Pictures of each class, int64 [classes]."""
        sizes = np.zeros(len(self.classes), np.int64)
        has_class = self.columns["classes"] >= 0
        np.add.at(
            sizes, self.columns["classes"][has_class], np.diff(self.columns["picture_ends"], prepend=0)[has_class]
        )
        return sizes

    @classmethod
    def open(cls, path: Path, digest: str | None = None, *, verify: bool = True) -> Self:
        """Map an index file, once it is read and found sound (``verify``).

        Raises OSError or ValueError where there is none of this form, or it has another digest.
        """
        head, start = open_head(path, _MAGIC, verify=verify)
        if digest not in (None, head["digest"]):
            raise ValueError(f"{path} is of other pictures")
        whole = np.asarray(np.memmap(path, np.uint8, "r"))  # one map for all columns
        columns = {}
        for name, dtype in _COLUMNS.items():
            start = -(-start // 64) * 64
            stop = start + head["lengths"][name] * np.dtype(dtype).itemsize
            columns[name] = whole[start:stop].view(dtype)
            start = stop
        return cls(head, columns, path)

    def save(self, path: Path) -> None:
        """Write the index under a temporary name, then rename it."""
        lengths = {name: len(column) for name, column in self.columns.items()}
        save_columns(path, _MAGIC, {**self._head, "lengths": lengths}, self.columns.values())


def _piece(texts: NDArray[np.uint8], ends: NDArray[np.int64], number: int) -> bytes:
    start = int(ends[number - 1]) + 1 if number else 0
    return texts[start : int(ends[number])].tobytes()


# ---------------------------------------------------------------------------- from the cache, or by a scan
