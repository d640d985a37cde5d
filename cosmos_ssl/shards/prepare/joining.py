"""Rows and images joined by hashed keys, in memory that does not grow with their number.

Both sides are dealt into 256 files by the first byte of the key, and each pair of files is joined by itself: 15 million
rows are 59,000 a file. The outcome is one number an image in a mapped file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.shards.prepare.rows import KEY

FILES = 256
NO_ROW, REPEATED = -1, -2
"""In the place of an image's row: no row names it; an image before it has the same URL."""
_ENTRY = np.dtype([("key", KEY), ("number", "<i8")])


@dataclass(frozen=True, slots=True)
class Joined:
    """Row of each image (or NO_ROW, REPEATED), int64 [images]; state of each row, uint8 [rows]: 0 no image, 1 used, 2 a
    repeat.
    """

    row_of: NDArray[np.int64]
    state: NDArray[np.uint8]


def deal(folder: Path, keys: Iterable[NDArray[np.bytes_]]) -> int:
    """Deal keys into the files of a folder with their number in the order given; how many there were."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [(folder / f"{i:02x}").open("wb", buffering=1 << 15) for i in range(FILES)]
    count = 0
    try:
        for piece in keys:
            for start in range(0, len(piece), 1 << 16):
                part = piece[start : start + (1 << 16)]
                entries = np.empty(len(part), _ENTRY)
                entries["key"], entries["number"] = part, np.arange(count, count + len(part))
                file_of = np.ascontiguousarray(part).view(np.uint8).reshape(-1, KEY.itemsize)[:, 0]
                entries = entries[np.argsort(file_of, kind="stable")]
                ends = np.cumsum(np.bincount(file_of, minlength=FILES))
                for file, first, last in zip(files, [0, *ends[:-1]], ends, strict=True):
                    if last > first:
                        file.write(entries[first:last].tobytes())
                count += len(part)
    finally:
        for file in files:
            file.close()
    return count


def entries(folder: Path, number: int) -> NDArray[Any]:
    """The keys of one file with their numbers, in rising order of these."""
    return np.fromfile(folder / f"{number:02x}", _ENTRY)


def repeats(found: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places of the entries whose key an earlier one has, and of that earlier one."""
    _, first, inverse = np.unique(found["key"], return_index=True, return_inverse=True)
    places = np.flatnonzero(first[inverse] != np.arange(len(found)))
    return places, first[inverse[places]]


def join(work: Path, rows: Iterable[NDArray[np.bytes_]], images: Iterable[NDArray[np.bytes_]]) -> Joined:
    """Find the row of every image; of rows or images that are named alike the first one counts. Raises OSError."""
    n_rows, n_images = deal(work / "deal-rows", rows), deal(work / "deal-images", images)
    row_of = mapped(work / "row_of", np.dtype(np.int64), n_images, NO_ROW)
    state = mapped(work / "state", np.dtype(np.uint8), n_rows, 0)
    for number in range(FILES):
        left, right = entries(work / "deal-rows", number), entries(work / "deal-images", number)
        left_keys, left_first = np.unique(left["key"], return_index=True)
        right_keys, right_first = np.unique(right["key"], return_index=True)
        repeat = np.ones(len(left), bool)
        repeat[left_first] = False
        state[left["number"][repeat]] = 2
        repeat = np.ones(len(right), bool)
        repeat[right_first] = False
        row_of[right["number"][repeat]] = REPEATED
        _, of_left, of_right = np.intersect1d(left_keys, right_keys, assume_unique=True, return_indices=True)
        found = left["number"][left_first[of_left]]
        row_of[right["number"][right_first[of_right]]] = found
        state[found] = 1
    return Joined(row_of, state)


def mapped(path: Path, kind: np.dtype[Any], count: int, fill: int) -> NDArray[Any]:
    """A new mapped column; an empty one where there is nothing to map."""
    if count == 0:
        path.write_bytes(b"")
        return np.empty(0, kind)
    found: NDArray[Any] = np.memmap(path, kind, "w+", shape=(count,))
    for start in range(0, count, 1 << 20):
        found[start : start + (1 << 20)] = fill
    return found


def open_mapped(path: Path, kind: np.dtype[Any]) -> NDArray[Any]:
    """A column that ``join`` wrote."""
    found: NDArray[Any] = np.memmap(path, kind, "r") if path.stat().st_size else np.empty(0, kind)
    return found


def spans(counts: Sequence[int], start: int, stop: int) -> Iterable[tuple[int, int, int]]:
    """The parts (of these sizes) that hold the numbers from start to stop: part, first and last place in it."""
    begin = 0
    for part, count in enumerate(counts):
        first, last = max(start - begin, 0), min(stop - begin, count)
        if first < last:
            yield part, first, last
        begin += count
