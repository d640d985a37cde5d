"""From a list of URLs to what the headers of each shard say: braces, patterns, one scan a shard."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from string import ascii_letters
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.data.storage import fetch, is_local, local_path, read_whole, request, retrying, unless_still
from cosmos_ssl.data.tar import BLOCK, Member, TarFault, members, sample_key
from cosmos_ssl.errors import DataError

LIST_EXTENSION = ".list"
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
"""Files in folders that Hugging Face's ``datasets`` wrote: in one of rows, and above several."""
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CAPTION_EXTENSIONS = ("json", "txt")
_HEAD = 2048
"""Bytes of each member that a shard's content hash covers: they come with its header."""
_SPREAD = 1 << 20
"""Bytes of each of the blocks at a shard's begin, middle and end that it covers."""
_MOST = 2**32 - 1
_RANGE = re.compile(r"(-?\d+|[A-Za-z])\.\.(-?\d+|[A-Za-z])(?:\.\.-?(\d+))?")
EXAMPLES = 3
"""Names shown in a message before the dots."""
MAX_SHARDS = 1 << 20
"""More names than this are a slip of the finger; they would take gigabytes and hours."""
LIST_BYTES = 1 << 28


def expand(urls: str | Sequence[str]) -> list[str]:
    """A list of shards from ``a-{0000..0009}.tar::b-*.tar`` or several such strings, local or fsspec URLs.

    Braces expand in order, ``*`` and ``?`` match existing files in sorted order, a folder stands for its ``.tar`` files
    in that order. A file ``NAME.list`` holds one path or URL a line (relative paths start at its folder, ``#`` starts a
    comment) and may repeat them: each time counts. Raises DataError where a pattern matches nothing, a list cannot be
    read, a shard is named twice outside of lists, or there would be more than ``MAX_SHARDS``.
    """
    from braceexpand import braceexpand

    found: list[str] = []
    listed: list[str] = []
    order: list[str] = []
    for text in [urls] if isinstance(urls, str) else urls:
        for part in filter(None, (p.strip() for p in text.split("::"))):
            try:
                _check_count(_strings(part), part)
                names = list(braceexpand(part))
            except (ValueError, RecursionError) as error:  # UnbalancedBracesError
                if isinstance(error, DataError):
                    raise
                raise DataError(f"data: '{part[:80]}': braces do not match") from error
            for url in (url for name in names for url in _glob(name)):
                (listed if url.endswith(LIST_EXTENSION) else found).append(url)
                order += read_list(url) if url.endswith(LIST_EXTENSION) else [url]
            _check_count(len(order), part)
    if not order:
        raise DataError("data: no shards are named. Give a path such as 'train-{0000..0009}.tar'")
    for urls_given in (found, listed):
        if len(set(urls_given)) < len(urls_given):
            raise DataError(
                f"data: {next(url for url, times in Counter(urls_given).items() if times > 1)} is named twice"
            )
    return order


def _check_count(count: int, where: str) -> None:
    if count > MAX_SHARDS:
        raise DataError(f"data: '{where[:80]}' names {count:,} shards; at most {MAX_SHARDS:,} are read together")


def _strings(pattern: str) -> int:
    """Return how many strings a pattern with braces stands for; ``braceexpand`` would hold all of them in memory before
    it gave the first.
    """
    outer: list[tuple[int, int, int]] = []
    before, product, start, at = 0, 1, 0, 0
    while at < len(pattern):
        letter = pattern[at]
        if letter == "\\":
            at += 1
        elif letter == "{":
            outer.append((before, product, start))
            before, product, start = 0, 1, at + 1
        elif letter == "," and outer:
            before, product = before + product, 1
        elif letter == "}" and outer:
            found = _RANGE.fullmatch(pattern, start, at)
            inner = before + product
            if found is not None:
                first, last = (ascii_letters.index(end) if end.isalpha() else int(end) for end in found.group(1, 2))
                inner = abs(last - first) // (int(found[3] or 1) or 1) + 1
            before, product, start = outer.pop()
            product *= inner
        at += 1
    return product


def read_list(url: str) -> list[str]:
    """The shards that a list file names, in its order. Raises DataError where it cannot be read or names none."""
    try:
        text = read_whole(url, LIST_BYTES).decode()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"data: no such list of shards: {url}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"data: {url} is no list of shards: it is no text") from error
    folder = str(local_path(url).absolute().parent) if is_local(url) else url.rpartition("/")[0]
    names = [name for line in text.splitlines() if (name := line.partition("#")[0].strip())]
    if not names:
        raise DataError(f"data: the list {url} names no shard")
    return [name if "://" in name or name.startswith("/") else f"{folder}/{name}" for name in names]


def _glob(url: str) -> list[str]:
    if is_local(url):
        path = local_path(url)
        if not set("*?") & set(url):
            return folder_shards(path) or [str(path)]
        path = path.absolute()
        matches = sorted(str(p) for p in Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    elif "*" in url:
        matches = request(url, lambda system, path: sorted(system.unstrip_protocol(p) for p in system.glob(path)))
    else:
        return [url]
    if not matches:
        raise DataError(f"data: no file matches {url}")
    return matches


def saved_folder(path: Path) -> bool:
    """Return whether ``save_to_disk`` of Hugging Face's ``datasets`` wrote this folder: one split, or several."""
    # Path.is_file fails on a folder that may not be looked into; whoever reads it says so better
    return any(os.path.isfile(path / name) for name in (SAVED, SAVED_SPLITS))  # noqa: PTH113


def folder_shards(path: Path) -> list[str]:
    """The ``.tar`` files in a folder, sorted; none for what is no folder. Raises DataError where it cannot be read."""
    if not path.is_dir():
        return []
    try:
        with os.scandir(path) as entries:
            return sorted(
                entry.path for entry in entries if entry.name.endswith(".tar") and not entry.name.startswith(".")
            )
    except PermissionError as error:
        raise DataError(f"data: the folder {path} cannot be read: {error.strerror}") from error


class Scan(NamedTuple):
    """What the headers of one shard say."""

    offsets: NDArray[np.int64]
    """Where each sample's first header begins, in bytes."""
    lengths: NDArray[np.uint32]
    """Bytes from there to the end of its last member."""
    notes: Notes
    fault: str = ""
    """Why the shard cannot be read to its end."""
    content: str = ""
    """Hash of the names, places and first bytes of all members and of three blocks: of all that a small shard holds."""


@dataclass(slots=True)
class Notes:
    """What is odd in a shard but stops nothing: counts, and names of a few members as examples."""

    keys: int = 0
    """Distinct neighbouring keys, with or without an image."""
    imageless: int = 0
    imageless_examples: list[str] = field(default_factory=list)
    bare: int = 0
    bare_examples: list[str] = field(default_factory=list)
    repeated: int = 0
    """Members whose names earlier ones of the shard have."""
    repeated_examples: list[str] = field(default_factory=list)

    def add(self, kind: str, example: str) -> None:
        """Count what is odd."""
        count = getattr(self, kind)
        setattr(self, kind, count + 1)
        if count < EXAMPLES:
            getattr(self, f"{kind}_examples").append(example)


def scan(url: str, size: int) -> Scan:
    """Walk the headers of one shard. Raises OSError where storage fails; a damaged archive is a ``fault``."""
    return unless_still(lambda: _scan(url, size), url)


def _scan(url: str, size: int) -> Scan:
    offsets: list[int] = []
    lengths: list[int] = []
    notes, fault = Notes(), ""
    names = set[str]()
    read, content = header_reader(url, size), blake2b(digest_size=16)
    groups = grouped(_hashed(members(read, size), read, content))
    try:
        for group in groups:
            extensions = {sample_key(m.name)[1] for m in group}
            notes.keys += 1
            for member in group:
                if member.name in names:
                    notes.add("repeated", f"{member.name} at byte {member.start:,}")
                names.add(member.name)
            if extensions.isdisjoint(IMAGE_EXTENSIONS):
                notes.add("imageless", group[0].name)
                continue
            if extensions.isdisjoint(CAPTION_EXTENSIONS):
                notes.add("bare", group[0].name)
            offsets.append(group[0].start)
            # more than a sample may have is a bad one when it is read
            lengths.append(min(group[-1].end - group[0].start, _MOST))
    except TarFault as error:
        fault = str(error)
    for start in (0, max(0, size - _SPREAD) // 2, max(0, size - _SPREAD)):
        content.update(read(start, min(_SPREAD, size)))
    return Scan(np.array(offsets, np.int64), np.array(lengths, np.uint32), notes, fault, content.hexdigest())


def _hashed(found: Iterator[Member], read: Callable[[int, int], bytes], content: blake2b) -> Iterator[Member]:
    """The same members, once they have gone into the hash."""
    for member in found:
        content.update(f"{member.name}\0{member.data} {member.size} ".encode("utf-8", "surrogateescape"))
        content.update(read(member.data, min(member.size, _HEAD)))
        yield member


def grouped(found: Iterator[Member]) -> Iterator[list[Member]]:
    """Neighbouring members of one key."""
    group: list[Member] = []
    last = ""
    for member in found:
        key = sample_key(member.name)[0]
        if group and key != last:
            yield group
            group = []
        group.append(member)
        last = key
    if group:
        yield group


def header_reader(url: str, size: int) -> Callable[[int, int], bytes]:
    """Reads with a small look-ahead where seeking is cheap, and by megabytes where each read is a request."""
    if is_local(url):
        file = local_path(url).open("rb", buffering=0)
        if hasattr(os, "posix_fadvise"):  # bodies are skipped: no read-ahead
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        chunk = 8 * BLOCK

        def more(offset: int, count: int) -> bytes:
            return retrying(lambda: os.pread(file.fileno(), count, offset), url)
    else:
        chunk = 4 << 20

        def more(offset: int, count: int) -> bytes:
            return fetch(url, offset, offset + count)

    first, buffer = 0, b""

    def read(offset: int, count: int) -> bytes:
        nonlocal first, buffer
        if not first <= offset <= offset + count <= first + len(buffer):
            first, buffer = offset, more(offset, min(max(count, chunk), size - offset))
        return buffer[offset - first : offset - first + count]

    return read


def spread(count: int, most: int) -> Sequence[int]:
    """Evenly spread places, ``most`` of them or all."""
    return range(count) if most >= count else [i * count // most for i in range(most)]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pool(tasks: int, *, processes: bool) -> Executor:
    """One process a core for what computes (where processes can be forked), else threads, for what waits."""
    if processes and cores() > 1 and "fork" in get_all_start_methods():
        return ProcessPoolExecutor(max(1, min(cores(), tasks, 64)), mp_context=get_context("fork"))
    return ThreadPoolExecutor(max(1, min(32, tasks)))
