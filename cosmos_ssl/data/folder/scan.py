"""Finds the pictures of a folder: one scan makes the index, which is opened again as long as it is good.

It is good as long as no folder below the root was changed, which the times of each folder tell (files that are added,
removed or renamed change them), and no picture, which the sizes and times of some tell.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.data.cache import cache_root, digest, kept
from cosmos_ssl.data.folder.content import THREADS, YOUNG, is_unchanged, look_into, mark_of
from cosmos_ssl.data.folder.index import FolderIndex, FolderNotes, shown
from cosmos_ssl.data.scan import EXAMPLES, folder_shards
from cosmos_ssl.data.storage import retrying
from cosmos_ssl.errors import DataError, did_you_mean
from cosmos_ssl.liveness import OnProgress, alive

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")
TEXT_EXTENSION = "txt"
_AT_ONCE = 1 << 20
"""Names of one folder that are Python objects at a time."""


def load_folder(
    root: Path,
    *,
    extensions: Sequence[str] = EXTENSIONS,
    cache_dir: str | Path | None = None,
    full_hash: bool = False,
    progress: OnProgress | None = None,
) -> FolderIndex:
    """The index of a folder: from its cache, or by a scan under a lock.

    The cache lies in ``cache_dir``; by default in ``.cosmos_ssl`` beside the folder, and in the user's cache folder
    where that is another user's or cannot be written. With ``full_hash`` every byte of the pictures is hashed, now and
    whenever some change. Raises DataError for a folder that is missing, cannot be read or holds no picture, OSError
    where storage fails.
    """
    began = time.time_ns()
    check_is_folder(root)
    return kept(
        _places(root, extensions, cache_dir),
        lambda path: _fresh(path, root, began, full_hash),
        lambda path: scan_folder(root, extensions, full_hash or _hashed_whole(_opened(path)), progress or alive),
    )


def is_indexed(root: Path, *, extensions: Sequence[str] = EXTENSIONS, cache_dir: str | Path | None = None) -> bool:
    """Return whether ``load_folder`` would find a cached index."""
    began = time.time_ns()
    return any(_fresh(path, root, began) is not None for path in _places(root, extensions, cache_dir))


def check_is_folder(root: Path) -> None:
    """Raise DataError unless ``root`` is a folder."""
    if not root.is_dir():
        what = "is no folder" if root.exists() else f"does not exist.{similar(root)}"
        raise DataError(f"data: {root} {what}")


def similar(path: Path) -> str:
    """For a path that does not exist: `` Did you mean 'x'?`` if its first missing part is much like something there, or
    an empty string.
    """
    path = path.absolute()
    try:
        missing = next(p for p in (path, *path.parents) if p.parent.is_dir())
        return did_you_mean(missing.name, sorted(p.name for p in missing.parent.iterdir()))
    except OSError:  # a folder that cannot be listed, a name that is too long
        return ""


def _places(root: Path, extensions: Sequence[str], cache_dir: str | Path | None) -> list[Path]:
    """Return where an index may lie, best first.

    Never in the folder itself, where other programs would take it for a class.
    """
    root = root.resolve()
    by_path, by_name = (f"folder-{digest((str(name), *extensions), ' ')}.bin" for name in (root, root.name))
    if cache_dir is not None:
        return [Path(cache_dir).expanduser() / by_path]
    return [root.parent / ".cosmos_ssl" / by_name, cache_root() / "manifests" / by_path]


def _opened(path: Path | None) -> FolderIndex | None:
    try:
        return None if path is None else FolderIndex.open(path)
    except (OSError, ValueError, KeyError):
        return None


def _hashed_whole(index: FolderIndex | None) -> bool:
    """Return whether there is an index with hashes of every byte, of the folder as it once was."""
    return index is not None and bool(index.hashes["full_pictures"])


def _fresh(path: Path, root: Path, began: int, full_hash: bool = False) -> FolderIndex | None:
    """The cached index if it is of the folder as it is now."""
    index = _opened(path)
    if index is None or (full_hash and not _hashed_whole(index)):
        return None
    if index.written >= began:  # another process made it while this one waited
        return index
    folders, stamps = index.folders(), index.columns["stamps"]
    above = os.fsencode(root)

    def same(start: int) -> bool:
        part = slice(start, start + 1024)
        return all(
            _stamp(above, folder) == stamp for folder, stamp in zip(folders[part], stamps[part].tolist(), strict=True)
        )

    with ThreadPoolExecutor(THREADS) as threads:
        unchanged = all(threads.map(same, range(0, len(folders), 1024)))
    return index if unchanged and is_unchanged(above, index) else None


def _stamp(root: bytes, folder: bytes) -> int:
    try:
        return mark_of(os.stat(root + b"/" + folder))  # noqa: PTH116  (a Path holds no bytes)
    except OSError:
        return -2


class _Listing(NamedTuple):
    """One folder: its stamp, the file it is, the folders in it, its pictures packed, and how many there are of what."""

    stamp: int
    file: tuple[int, int]
    folders: list[bytes]
    names: bytes
    pictures: int
    texts: int
    others: int
    other_examples: list[bytes]


def _list(root: bytes, folder: bytes, extensions: frozenset[bytes]) -> _Listing:
    folders, others, packs = list[bytes](), list[bytes](), list[NDArray[np.bytes_]]()
    names = list[bytes]()
    texts = other_count = 0
    path = root + b"/" + folder if folder else root
    try:
        now, found = time.time_ns(), os.stat(path)  # noqa: PTH116
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(b"."):
                    continue
                link = entry.is_symlink()
                if os.path.isdir(entry.path) if link else entry.is_dir():  # noqa: PTH112
                    folders.append(name)
                    continue
                extension = name.rpartition(b".")[2].lower()
                is_file = os.path.isfile(entry.path) if link else entry.is_file(follow_symlinks=False)  # noqa: PTH113
                if is_file and extension in extensions:
                    names.append(name)
                    if len(names) == _AT_ONCE:
                        packs.append(np.array(names))
                        names.clear()
                elif is_file and extension == TEXT_EXTENSION.encode():
                    texts += 1
                else:
                    other_count += 1
                    others += [name] * (other_count <= EXAMPLES)
    except PermissionError as error:
        raise DataError(f"data: the folder {shown(path)} cannot be read: {error.strerror}") from error
    packed, count = _pack([*packs, np.array(names)] if names else packs)
    young = abs(now - found.st_ctime_ns) < YOUNG
    file = (found.st_dev, found.st_ino)
    return _Listing(-1 if young else mark_of(found), file, folders, packed, count, texts, other_count, others)


def _pack(packs: Sequence[NDArray[np.bytes_]]) -> tuple[bytes, int]:
    """Names in byte order, each ended by a NUL (which no name holds), and how many."""
    if not packs:
        return b"", 0
    names = np.sort(np.concatenate(packs))
    table = names.astype(f"S{names.itemsize + 1}").view(np.uint8).reshape(len(names), -1)
    kept = table != 0
    kept[:, 1:] |= kept[:, :-1]  # and the first NUL after each name
    return table[kept].tobytes(), len(names)


def _walk(root: Path, extensions: Sequence[str], progress: OnProgress) -> Iterator[tuple[bytes, _Listing]]:
    """Every folder below the root once, level by level; of several links to one folder the first in byte order
    counts.
    """
    above, wanted = os.fsencode(root), frozenset(os.fsencode(e.lower()) for e in extensions)
    seen = set[tuple[int, int]]()
    level, known = [b""], 1
    # threads: a folder on a network file system is waited for
    with ThreadPoolExecutor(THREADS) as threads:
        while level:
            listings = threads.map(lambda f: retrying(lambda: _list(above, f, wanted), shown(above + b"/" + f)), level)
            below = list[bytes]()
            for done, (folder, listing) in enumerate(zip(level, listings, strict=True), known - len(level) + 1):
                progress(done, known)
                if listing.file in seen:
                    continue
                seen.add(listing.file)
                below += [folder + b"/" + name if folder else name for name in listing.folders]
                yield folder, listing
            level = sorted(below)
            known += len(level)


def scan_folder(
    root: Path, extensions: Sequence[str] = EXTENSIONS, full_hash: bool = False, progress: OnProgress = alive
) -> FolderIndex:
    """List every folder below the root but hidden ones, and look into its pictures. Raises as ``load_folder`` does."""
    found = list(_walk(root, extensions, progress))
    found.sort(key=lambda item: (item[0].partition(b"/")[0], item[0]))
    (_, top), below = found[0], found[1:]
    notes = FolderNotes(
        texts=sum(listing.texts for _, listing in found), others=sum(listing.others for _, listing in found)
    )
    examples = (shown(f + b"/" * bool(f) + name) for f, listing in found for name in listing.other_examples)
    notes.other_examples = [example for _, example in zip(range(EXAMPLES), examples, strict=False)]
    classes = list[bytes]()
    if any(listing.pictures for _, listing in below):
        classes = sorted(top.folders)
        notes.loose, notes.loose_examples = (
            top.pictures,
            [shown(name) for name in top.names.split(b"\0", EXAMPLES)[:EXAMPLES] if name],
        )
        found[0] = b"", top._replace(names=b"", pictures=0)
        filled = {folder.partition(b"/")[0] for folder, listing in below if listing.pictures}
        empty = [shown(name) for name in classes if name not in filled]
        notes.empty, notes.empty_examples = len(empty), empty[:EXAMPLES]
    if not sum(listing.pictures for _, listing in found):
        looked = ", ".join(f".{extension}" for extension in extensions)
        there = f" It holds {notes.others:,} other files ({', '.join(notes.other_examples)})" if notes.others else ""
        shards = " Its .tar files may be shards: data.type=webdataset trains on them" if folder_shards(root) else ""
        raise DataError(f"data: no pictures in {root} or below it (looked for {looked}).{there}{shards}")
    index, folders = _built(found, classes, notes), len(found)
    told = lambda done, total: progress(folders + done, folders + total)  # noqa: E731
    return index.looked_into(*look_into(os.fsencode(root), index, full_hash=full_hash, progress=told))


def _built(found: list[tuple[bytes, _Listing]], classes: Sequence[bytes], notes: FolderNotes) -> FolderIndex:
    """The columns of these folders, which are used up (names are held once and a bit, not twice)."""
    numbers = {name: number for number, name in enumerate(classes)}
    folders = np.frombuffer(b"".join(folder + b"\0" for folder, _ in found), np.uint8)
    columns: dict[str, NDArray[Any]] = {
        "names": np.empty(sum(len(listing.names) for _, listing in found), np.uint8),
        "name_ends": np.empty(sum(listing.pictures for _, listing in found), np.int64),
        "folders": folders,
        "folder_ends": np.flatnonzero(folders == 0).astype(np.int64),
        "picture_ends": np.cumsum([listing.pictures for _, listing in found], dtype=np.int64),
        "classes": np.array([numbers.get(folder.partition(b"/")[0], -1) for folder, _ in found], np.int32),
        "stamps": np.array([listing.stamp for _, listing in found], np.int64),
        "marks": np.empty(0, np.int64),
    }
    names_hash = hashlib.sha256(b"\0".join(classes))
    at = place = 0
    for number, (folder, listing) in enumerate(found):
        names = np.frombuffer(listing.names, np.uint8)
        columns["names"][at : at + len(names)] = names
        columns["name_ends"][place : place + listing.pictures] = np.flatnonzero(names == 0) + at
        if listing.pictures:
            names_hash.update(b"\0\0" + folder + b"\0" + listing.names)
        at, place = at + len(names), place + listing.pictures
        found[number] = folder, listing._replace(names=b"")
    head = {
        "classes": [shown(name) for name in classes],
        "digest": names_hash.hexdigest()[:16],
        "hashes": {},
        "notes": asdict(notes),
        "written": time.time_ns(),
    }
    return FolderIndex(head, columns)
