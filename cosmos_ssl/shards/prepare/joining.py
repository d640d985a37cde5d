"""Rows and images joined by their keys; the outcome is one number an image in a mapped file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.shards.keys import FILES, deal, entries

NO_ROW, REPEATED = -1, -2
"""In the place of an image's row: no row names it; an image before it has the same URL."""


def join(work: Path, rows: Iterable[NDArray[np.bytes_]], images: Iterable[NDArray[np.bytes_]]) -> NDArray[np.int64]:
    """Find the row of every image; of rows or images that are named alike the first one counts.

    The row of each image (or NO_ROW, REPEATED), int64 [images], is kept as ``row_of``; the state of each row, uint8
    [rows], as ``state``: 0 no image, 1 used, 2 a repeat. Raises OSError.
    """
    n_rows, n_images = deal(work / "deal-rows", rows), deal(work / "deal-images", images)
    row_of = _mapped(work / "row_of", np.dtype(np.int64), n_images)
    state = _mapped(work / "state", np.dtype(np.uint8), n_rows)
    for number in range(FILES):
        left, right = entries(work / "deal-rows", number), entries(work / "deal-images", number)
        left_keys, left_first = np.unique(left["key"], return_index=True)
        right_keys, right_first = np.unique(right["key"], return_index=True)
        state[left["number"]] = 2  # but for the first of each
        state[left["number"][left_first]] = 0
        row_of[right["number"]] = REPEATED
        row_of[right["number"][right_first]] = NO_ROW
        _, of_left, of_right = np.intersect1d(left_keys, right_keys, assume_unique=True, return_indices=True)
        found = left["number"][left_first[of_left]]
        row_of[right["number"][right_first[of_right]]] = found
        state[found] = 1
    return row_of


def _mapped(path: Path, kind: np.dtype[Any], count: int) -> NDArray[Any]:
    """A new column, mapped where it has any numbers."""
    if count:
        return np.memmap(path, kind, "w+", shape=(count,))
    path.write_bytes(b"")
    return np.empty(0, kind)


def open_mapped(path: Path, kind: np.dtype[Any]) -> NDArray[Any]:
    """A column that ``join`` wrote."""
    found: NDArray[Any] = np.memmap(path, kind, "r") if path.stat().st_size else np.empty(0, kind)
    return found
