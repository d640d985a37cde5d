"""Hashes of names and contents, dealt into files: what is alike is found in memory that does not grow with it.

Equal keys fall into the same of 256 files, by their first byte, and each file is looked at by itself: 15 million keys
are 59,000 a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEY = np.dtype("S16")
"""128 bits of a hash: among 10^9 names two are alike with probability 10^-21."""
FILES = 256
_ENTRY = np.dtype([("key", KEY), ("number", "<i8")])
_AT_ONCE = 1 << 16


def digest(*parts: bytes) -> bytes:
    """The key of something that has these parts."""
    return blake2b(b"\0".join(parts), digest_size=KEY.itemsize).digest()


def hashed(names: Sequence[bytes]) -> NDArray[np.bytes_]:
    """The keys of these names, [n]."""
    return np.frombuffer(b"".join([blake2b(name, digest_size=16).digest() for name in names]), KEY)


def deal(folder: Path, keys: Iterable[NDArray[np.bytes_]]) -> int:
    """Deal keys into the files of a folder with their number in the order given; how many there were."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [(folder / f"{i:02x}").open("wb", buffering=1 << 15) for i in range(FILES)]
    count = 0
    try:
        for part in (piece[at : at + _AT_ONCE] for piece in keys for at in range(0, len(piece), _AT_ONCE)):
            found = np.empty(len(part), _ENTRY)
            found["key"], found["number"] = part, np.arange(count, count + len(part))
            file_of = np.ascontiguousarray(part).view(np.uint8).reshape(-1, KEY.itemsize)[:, 0]
            found = found[np.argsort(file_of, kind="stable")]
            ends = np.cumsum(np.bincount(file_of, minlength=FILES))
            for file, first, last in zip(files, [0, *ends[:-1]], ends, strict=True):
                if last > first:
                    file.write(found[first:last].tobytes())
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
